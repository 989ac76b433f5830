"""What the transformer back end consists of: modules that share constants, pages, a stream, and
nothing else.
"""

import copy
import math

import pytest
import torch
from torch import fx

from tests.support.both import both, odd_model
from tests.support.models import on_all_backends
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import error
from tintc.ir.config import PRESETS, SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.ops.embedding import segment, segment_mask
from tintc.runtime.backends.transformer.modules.parts import Layer, blank, copied
from tintc.runtime.backends.transformer.pages import FillTile, PrefixPages, ReadSlot
from tintc.runtime.backends.transformer.structure import SHARES, Structure
from tintc.runtime.simulator import Simulator

CUTS = tuple(operator.implementation for operator in (segment, segment_mask))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["opt", "gpt2", "nano"])
def test_sharing_changes_no_bit(family: str, preset: str) -> None:
    found, inputs = both(family, preset, SHARES), SCENARIOS["padded_both"](3, 11, 29)
    with torch.inference_mode():
        expected = found["none"](**inputs, return_initial=True)
        updates = found["none"].updates(**inputs)
        for share in SHARES:
            out = found[share](**inputs, return_initial=True)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.initial_logits, expected.initial_logits)
            assert torch.equal(found[share](**inputs).logits, found["none"](**inputs).logits)
            ours = found[share].updates(**inputs)
            assert all(torch.equal(ours[slot], value) for slot, value in updates.items())


def structure(simulator: Simulator) -> Structure:
    assert simulator.structure is not None
    return simulator.structure


def numbers(simulator: Simulator) -> int:
    """Structural constants, counted."""
    return sum(p.numel() for p in structure(simulator).parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_sharing_saves_constants(preset: str) -> None:
    """Without sharing every use pays; with it, each module once. What is used, and how often, is
    the same.
    """
    found = both("gpt2", preset, SHARES)
    counts = [numbers(found[share]) for share in SHARES]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3
    uses = {share: structure(found[share]).uses for share in SHARES}
    code = structure(found["none"]).code.numel()
    assert counts[0] == code + sum(use.numbers for use in uses["none"])
    assert uses["none"] == uses["layers"] == uses["all"], (
        "the uses are the same, whatever one module serves for"
    )
    for share, count in zip(SHARES, counts, strict=True):
        once = {use.owners[share]: use.numbers for use in uses[share]}
        assert count == code + sum(once.values())
        assert set(once) == set(structure(found[share]).layers)
        assert {structure(found[other]).numbers(share) for other in SHARES} == {count}
    assert len({use.owners["none"] for use in uses["none"]}) == len(uses["none"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["opt", "gpt2", "nano"])
def test_formulas_give_the_numbers(family: str, preset: str) -> None:
    for use in structure(both(family, preset)["none"]).uses:
        assert eval(use.formula, {"ceil": math.ceil}, dict(use.sizes)) == use.numbers, use


@pytest.mark.slow
def test_blocks_share_and_steps_do_not() -> None:
    """`layers`: a deeper model has no more constants; another step has. `all`: neither."""
    count: dict[tuple[str, int, int], int] = {}
    for depth, steps in ((2, 1), (3, 1), (2, 2)):
        found = on_all_backends(
            odd_model("nano", layers=depth), SimulatorConfig.paper(steps=steps), SHARES
        )
        count |= {(share, depth, steps): numbers(found[share]) for share in SHARES}
    assert count["none", 3, 1] > count["none", 2, 1]
    assert count["layers", 3, 1] == count["layers", 2, 1]
    assert count["layers", 2, 2] > count["layers", 2, 1]
    assert count["all", 3, 1] == count["all", 2, 1] == count["all", 2, 2]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_structure_holds_no_number_of_the_model(family: str, share: str) -> None:
    """Two models of one shape have the same structure, and no outer training would change it."""
    config = SimulatorConfig.exact(steps=2)
    first, second = (
        on_all_backends(odd_model(family, seed=seed), config, (share,))[share] for seed in (0, 1)
    )
    ours, theirs = structure(first).state_dict(), structure(second).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(p.requires_grad for p in structure(first).parameters())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["opt", "gpt2", "nano"])
def test_weights_reach_the_stream_through_pages_alone(family: str, preset: str) -> None:
    """With the pages zeroed the logits are those of any model with the same tables."""
    inputs, first = SCENARIOS["ragged"](2, 9, 29), odd_model(family)
    second = copy.deepcopy(first)
    config = SimulatorConfig.preset(preset, inner_lr=0.01, steps=2)
    simulators = [on_all_backends(first, config)["none"]]
    in_slots = {slot.parameter for slot in simulators[0].program.layout.prefix.values()}
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if name in in_slots:
                parameter.normal_()
    simulators.append(on_all_backends(second, config)["none"])
    with torch.inference_mode():
        different = [simulator(**inputs).logits for simulator in simulators]
        assert error(*different) > 1e-2
    for simulator in simulators:
        assert isinstance(simulator.prefix, PrefixPages)
        with torch.no_grad():
            for page in simulator.prefix.pages:
                page.zero_()
    with torch.inference_mode():
        same = [simulator(**inputs, return_initial=True) for simulator in simulators]
    assert torch.equal(same[0].logits, same[1].logits)
    assert torch.equal(same[0].initial_logits, same[1].initial_logits)


def calls(program: fx.GraphModule, kind: str) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == kind]


@pytest.mark.parametrize(
    "wanted", [("logits",), ("logits", "initial_logits"), ("initial_logits",), ("updates",)]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_program_is_a_list_of_modules(preset: str, wanted: tuple[str, ...]) -> None:
    """Besides modules it makes the stream once, copies each output of it, and cuts inputs to the
    segment: no arithmetic.
    """
    simulator = both("gpt2", preset)["none"]
    program = simulator.emitted(wanted)
    assert {node.op for node in program.graph.nodes} <= {
        "placeholder",
        "call_module",
        "call_function",
        "output",
    }
    targets = [node.target for node in calls(program, "call_function")]
    assert targets.count(blank) == 1
    assert targets.count(copied) == len(set(wanted) - {"updates"})
    assert set(targets) <= {blank, copied, *CUTS}
    inputs = {node for node in program.graph.nodes if node.op == "placeholder"}
    for node in calls(program, "call_function"):
        if node.target in CUTS:
            assert set(node.all_input_nodes) <= inputs
    for node in calls(program, "call_module"):
        module = program.get_submodule(str(node.target))
        assert isinstance(module, Layer) or (
            isinstance(module, ReadSlot) and wanted == ("updates",)
        )
        if isinstance(module, Layer):
            assert structure(simulator).layers[str(node.target)] is module
        else:
            assert not [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_module_takes_and_gives_one_stream_or_page(preset: str) -> None:
    """Nothing else is carried from one module to the next; tables and masks are inputs."""
    program = both("opt", preset)["none"].emitted()
    streams = {node for node in program.graph.nodes if node.target is blank}
    pages = {node for node in program.graph.nodes if str(node.target).startswith("page_")}
    inputs = {node for node in program.graph.nodes if node.op == "placeholder"}
    newest = {"stream": next(iter(streams))}
    for node in calls(program, "call_module"):
        assert node.args[0] in streams | pages
        (streams if node.args[0] in streams else pages).add(node)
        rest = {n for n in node.all_input_nodes if n is not node.args[0]}
        cuts = {n for n in program.graph.nodes if n.target in CUTS}
        assert rest <= streams | pages | inputs | cuts
        used = {n for n in node.all_input_nodes if n in streams}
        assert used == {newest["stream"]} or not used, (
            "only the newest state of the stream is read: older ones are overwritten"
        )
        if node in streams:
            newest["stream"] = node


def test_a_program_from_updates_fills_pages() -> None:
    program = both("gpt2")["none"].emitted(from_updates=True)
    kinds = {
        type(program.get_submodule(str(node.target))) for node in calls(program, "call_module")
    }
    assert FillTile in kinds
    assert all(issubclass(kind, (Layer, FillTile)) for kind in kinds)
    assert not [kind for kind in kinds if "Descent" in kind.__name__ or "Backward" in kind.__name__]


def test_programs_are_kept_and_share_modules() -> None:
    simulator = copy.deepcopy(both("opt")["none"])
    before = numbers(simulator)
    assert simulator.emitted() is simulator.emitted()
    for wanted in (("logits",), ("updates",), ("initial_logits",), ("logits", "initial_logits")):
        simulator.emitted(wanted)
    simulator.emitted(from_updates=True)
    assert numbers(simulator) == before


def test_sharing_needs_the_transformer() -> None:
    program, tensors = both("opt")["fused"].program, both("opt")["fused"].prefix.tensors()
    with pytest.raises(UsageError, match="backend is 'paper'; expected one of fused, transformer"):
        Simulator(program, tensors, backend="paper")
    with pytest.raises(UsageError, match="share is 'some'; expected one of none, layers, all"):
        Simulator(program, tensors, backend="transformer", share="some")
    with pytest.raises(
        UsageError, match="share is 'all', but the fused back end has no structural constants"
    ):
        Simulator(program, tensors, share="all")
