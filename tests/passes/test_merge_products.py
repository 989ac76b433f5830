"""merge_products and the folding of what depends on weights alone, run on a CPU as if it were a
GPU.
"""

import dataclasses

import pytest
import torch

from tests.support.families import FAMILIES as EVERY_FAMILY
from tests.support.models import FAMILIES, ragged_train_mask, simulate, tokens
from tests.support.stages import assert_golden, printed
from tests.support.tolerances import OPTIMIZED, error
from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.linear import linear_forward, stack_rows
from tintc.ir.outputs import Output
from tintc.runtime.batch import Batch
from tintc.runtime.inputs import prepare
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.optimize import optimize
from tintc.runtime.specialize.programs import Programs, Source

LIMIT = OPTIMIZED[torch.float64]


def simulator(family: str = "opt", preset: str = "paper", **changes: object) -> Simulator:
    config = SimulatorConfig.preset(preset, inner_lr=0.01, **changes)
    return simulate(
        FAMILIES[family]() if family in FAMILIES else EVERY_FAMILY[family].build(), config
    )


def choices(found: Simulator, **changes: object) -> Choices:
    on_gpu = {
        "enabled": frozenset({"merge_products"}),
        "device": "cuda",
        "differentiable": False,
        "dtype": torch.float64,
    }
    return dataclasses.replace(Choices((Output.LOGITS,)), **{**on_gpu, **changes})  # type: ignore[arg-type]


def operators(found: Simulator, **changes: object) -> list[str]:
    return [
        n.name
        for n in optimize(found.program, choices(found, **changes)).nodes
        if is_tint(n, stack_rows)
    ]


def test_q_k_and_v_are_one_product() -> None:
    graph = optimize((found := simulator(layers=1)).program, choices(found))
    merged = [
        n
        for n in graph.nodes
        if is_tint(n, linear_forward) and is_tint(argument(n, "weight"), stack_rows)
    ]
    assert [len(argument(argument(n, "weight"), "parts")) for n in merged] == [
        3,
        3,
        2,
    ]  # block 0; block 1 before and after v learns
    assert all(
        len(argument(argument(n, "bias"), "parts")) == len(argument(argument(n, "weight"), "parts"))
        for n in merged
    )


def test_gate_and_up_are_one_product() -> None:
    graph = optimize((found := simulator("llama", layers=1)).program, choices(found))
    groups = [argument(n, "parts") for n in graph.nodes if is_tint(n, stack_rows)]
    assert any("gate" in group[0].name and "up" in group[1].name for group in groups)


@pytest.mark.parametrize(
    "changes", [{"device": "cpu"}, {"differentiable": True}, {"enabled": frozenset()}], ids=str
)
def test_left_alone(changes: dict[str, object]) -> None:
    assert operators(simulator(), **changes) == []


def run(found: Simulator, how: Choices, programs: Programs) -> torch.Tensor:
    ids, train = tokens(3, 11, found.program.facts.vocab_size), ragged_train_mask(3, 11)
    inputs = prepare(found.program.facts, found.dtype, found.device, Batch(ids, train))
    emitted, weights = programs.get(how), found.prefix.direct()
    segment = {"inner_lr": found.inner_lr, "segment": inputs.segment}
    values = {
        Source.WEIGHT: weights,
        Source.INPUT: inputs.tensors | segment,
        Source.FOLDED: programs.folded(emitted, weights),
    }
    with torch.no_grad():
        logits: torch.Tensor = emitted.module(*emitted.bound(values))["logits"]
    return logits


@pytest.mark.parametrize("preset", ["paper", "exact"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama", "qwen2", "gpt_neox"])
def test_numbers(family: str, preset: str) -> None:
    found = simulator(family, preset, steps=2)
    programs = Programs(found.program, None, True)
    expected = run(found, choices(found, enabled=frozenset()), programs)
    assert error(run(found, choices(found), programs), expected) < LIMIT
    low_rank = frozenset(slot for slot in found.program.layout.prefix)
    every = choices(found, enabled=frozenset(programs.enabled), low_rank=low_rank)
    assert error(run(found, every, programs), expected) < LIMIT


def test_stacked_weights_are_made_once_and_follow_the_weights() -> None:
    found = simulator()
    programs, weights = Programs(found.program, None, True), found.prefix.direct()
    emitted = programs.get(choices(found))
    first = programs.folded(emitted, weights)
    assert (
        len(first) == 8
    )  # weights and biases of q, k and v, and of q and k behind the update, in two blocks
    assert all(again is first[name] for name, again in programs.folded(emitted, weights).items())
    before = run(found, choices(found), programs)
    with torch.no_grad():
        found.prefix.get_parameter("model.decoder.layers.0.self_attn.q_proj.weight").mul_(2)
    after = run(found, choices(found), programs)
    assert error(after, before) > 1e-3
    assert error(after, run(found, choices(found, enabled=frozenset()), programs)) < LIMIT


def test_golden(update_golden: bool) -> None:
    found = simulator(layers=1)
    assert_golden("merge_products", printed(optimize(found.program, choices(found))), update_golden)
