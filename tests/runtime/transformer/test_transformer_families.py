"""Models of other families on the transformer back end: everything that a simulator returns,
sharing, pages and counts.

Each stands for what the others lack: rotary positions of both pairings, biases of keys, windows,
soft-caps, norms of heads with and without shifts, gains with an offset, learned scales, gated
units, and weights that lie in a product by turns.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.both import LIMIT, Both, assert_equal_results, relative
from tests.support.every import BUILDERS, captured, simulator_of
from tests.support.families import FAMILIES, VOCAB
from tests.support.models import simulate
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import BACKENDS, error, measured
from tintc import parameter_report
from tintc.ir.config import PRESETS, SimulatorConfig
from tintc.ir.inputs import is_table
from tintc.ir.ops.embedding import segment, segment_mask
from tintc.ir.ops.linear import prefix
from tintc.ir.ops.position import window_mask
from tintc.runtime.backends.transformer.modules.parts import Layer, blank, copied
from tintc.runtime.backends.transformer.pages import PrefixPages, read_slot
from tintc.runtime.backends.transformer.structure import SHARES
from tintc.runtime.simulator import Simulator

MASKS = tuple(operator.implementation for operator in (segment, segment_mask, window_mask))

# Operators and arguments that each model has and OPT and GPT-2 lack.
MODELS: dict[str, set[str]] = {
    "gemma2": {"rotary half", "window_mask", "softcap", "offset", "multiply", "scale", "groups"},
    "gptj": {"rotary interleaved"},
    "bloom": {"bias", "period"},
    "phi-qk-norm": {"rotary half", "heads", "heads with a shift"},
    "hand-alibi": {"bias", "learned scale", "multiply"},
}


def simulators(name: str, preset: str) -> Both:
    """Made once a process: do not change them."""
    config = SimulatorConfig.preset(preset, inner_lr=0.002, steps=2)
    found = {"fused": simulator_of(name, False, config)}
    return found | {
        share: simulator_of(name, False, config, "transformer", share) for share in SHARES
    }


def has(simulator: Simulator) -> set[str]:
    """What of all that MODELS names the program has."""
    found = set()
    for node in simulator.program.graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        name = node.target._schema.name.removeprefix("tint::")
        values = {
            a.name: value
            for a, value in zip(node.target._schema.arguments, node.args, strict=False)
        }
        found |= {name} & {"window_mask", "multiply", "scale"}
        if name == "rotary":
            found.add(f"rotary {values['pairing']}")
        elif name == "attention_forward":
            traits = {
                "softcap": values["softcap"],
                "bias": values["bias"],
                "groups": values["heads"] != values["kv_heads"],
            }
            found |= {trait for trait, value in traits.items() if value}
        elif name == "norm_forward":
            several = values["heads"] > 1
            traits = {
                "heads": several,
                "heads with a shift": several and values["beta"],
                "offset": values["offset"],
            }
            traits["learned scale"] = values["kind"] == "scale"
            found |= {trait for trait, value in traits.items() if value}
    slots = simulator.program.layout.prefix.values()
    rows = {
        slot.parameter: simulator.prefix.tensors()[slot.parameter].shape[int(slot.transpose)]
        for slot in slots
    }
    return found | (
        {"period"} if any(slot.rows.period < rows[slot.parameter] for slot in slots) else set()
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_the_models_have_what_they_stand_for(name: str) -> None:
    assert has(simulators(name, "paper")["fused"]) == MODELS[name]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_equal_results(name: str, preset: str) -> None:
    found = simulators(name, preset)
    scenario = "padded_left" if name in FAMILIES else "ragged"
    assert_equal_results(found["none"], found["fused"], SCENARIOS[scenario](3, 9, VOCAB))


@pytest.mark.slow  # by default: that of test_structure.py
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_sharing_changes_no_bit(name: str, preset: str) -> None:
    found, inputs = simulators(name, preset), SCENARIOS["ragged"](2, 9, VOCAB)
    with torch.inference_mode():
        expected, updates = (
            found["none"](**inputs, return_initial=True),
            found["none"].updates(**inputs),
        )
        for share in ("layers", "all"):
            out, ours = found[share](**inputs, return_initial=True), found[share].updates(**inputs)
            assert torch.equal(out.logits, expected.logits) and torch.equal(
                out.initial_logits, expected.initial_logits
            )
            assert all(torch.equal(ours[slot], value) for slot, value in updates.items())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_counts(name: str, preset: str) -> None:
    """Of every module by its formula, of the whole by what there is; tables of positions are no
    parameters of anybody.
    """
    found = simulators(name, preset)
    # Buffers of floating-point numbers are parameters of a simulator; hand-written ALiBi has its
    # slopes in one.
    parameters = sum(
        value.numel()
        for value in captured(name, False).tensors.values()
        if value.is_floating_point()
    )
    for share in ("fused", *SHARES):
        report = parameter_report(found[share])
        assert (
            report["total"]
            == sum(p.numel() for p in found[share].parameters())
            == sum(part["count"] for part in report["parts"])
        )
        assert report["auxiliary"] == parameters
        for row in report["structure"]:
            assert eval(row["formula"], {"ceil": math.ceil}, row["sizes"]) == row["numbers"], row
        assert share in ("fused", "none") or report["shares"][share] == report["total"]
    assert parameter_report(found["fused"])["total"] == parameters + 1
    numbers = [parameter_report(found[share])["total"] for share in SHARES]
    assert numbers[0] > numbers[-1] and numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize("name", MODELS)
def test_pages_give_back_the_model(name: str) -> None:
    """Rows that alternate between slots, too; the program's tables are held beside them, and are
    not in a state dict.
    """
    model, simulator = BUILDERS[name](), simulators(name, "paper")["none"]
    assert isinstance(simulator.prefix, PrefixPages)
    tensors, tables = simulator.prefix.tensors(), simulator.program.tables
    own = captured(name, False).tensors
    assert set(tensors) == {*own, *tables}
    assert all(torch.equal(tensors[key], value) for key, value in {**own, **tables}.items())
    assert {key for key, _ in simulator.prefix.named_buffers()} >= {
        f"tables.{key}" for key in tables
    }
    pages = dict(enumerate(simulator.prefix.pages))
    for slot in simulator.program.layout.prefix.values():
        rows = slot.rows
        wanted = prefix(own[slot.parameter], rows.start, rows.stop, rows.period, slot.transpose)
        assert torch.equal(read_slot(pages, slot), wanted), slot.name
    state = simulator.updated_state_dict(**SCENARIOS["ragged"](1, 9, VOCAB))
    assert not any(is_table(key) for key in state)
    model.load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "bloom", "phi-qk-norm"])
def test_outer_gradients(name: str) -> None:
    """Through rotary positions, gates, soft-caps, biases of keys and norms of heads, by records and
    copies instead of in place.
    """
    inputs, gradients = SCENARIOS["scattered"](2, 8, VOCAB), {}
    for backend in ("fused", "none"):
        simulator = simulators(name, "exact")[backend]
        weights = [simulator.inner_lr, *simulator.prefix.parameters()]
        logits = simulator(**inputs).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        gradients[backend] = [
            torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)
        ]
    kind = "transformer against fused: gradient of inner_lr"
    assert measured(kind, relative(gradients["none"][0], gradients["fused"][0])) < LIMIT
    simulator = simulators(name, "exact")["none"]
    names = [key for key, _ in simulators(name, "exact")["fused"].prefix.named_parameters()]
    expected = dict(zip(names, gradients["fused"][1:], strict=True))
    ours = dict(
        zip(
            [key for key, _ in simulator.prefix.named_parameters()],
            gradients["none"][1:],
            strict=True,
        )
    )
    pages = {index: ours[f"pages.{index}"] for index in range(len(simulator.prefix.pages))}
    for slot in simulator.program.layout.prefix.values():
        rows = prefix(
            expected[slot.parameter],
            slot.rows.start,
            slot.rows.stop,
            slot.rows.period,
            slot.transpose,
        )
        kind = "transformer against fused: gradient of weights"
        assert measured(kind, error(read_slot(pages, slot), rows)) < LIMIT, slot.name


def test_masks_follow_from_inputs_alone() -> None:
    """Everything else of Gemma 2, soft-caps and gates too, is a module that rewrites the stream or
    a page.
    """
    program = simulators("gemma2", "exact")["none"].emitted()
    inputs = {node for node in program.graph.nodes if node.op == "placeholder"}
    masks = [node for node in program.graph.nodes if node.target in MASKS]
    assert window_mask.implementation in {node.target for node in masks}
    assert all(set(node.all_input_nodes) <= inputs | set(masks) for node in masks)
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert node in masks or node.target in (blank, copied)
        elif node.op == "call_module":
            assert isinstance(program.get_submodule(str(node.target)), Layer)


@pytest.mark.parametrize(("name", "preset"), [("gemma2", "exact"), ("bloom", "paper")])
@pytest.mark.slow
def test_float32(name: str, preset: str) -> None:
    inputs, exact = SCENARIOS["ragged"](2, 9, VOCAB), simulators(name, preset)["fused"]
    config = SimulatorConfig.preset(preset, inner_lr=0.002, steps=2)
    low = simulate(BUILDERS[name](dtype=torch.float32), config, backend="transformer")
    with torch.inference_mode():
        expected, found = exact(**inputs).logits, low(**inputs).logits
    assert found.dtype == torch.float32
    assert (
        measured("transformer, torch.float32: logits", error(found, expected))
        < BACKENDS[torch.float32]
    )
