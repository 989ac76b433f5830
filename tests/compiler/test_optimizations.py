"""Optimizations of the fused back end change nothing but rounding: whole simulators with all, some
and none of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import tintc
from tests.support.families import FAMILIES, Builder
from tests.support.grid import grid, some
from tests.support.models import simulate, tokens
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import OPTIMIZED, error, measured
from tests.support.variants import VARIANTS
from tintc.ir import calibration
from tintc.ir.config import SimulatorConfig
from tintc.ir.ops import head
from tintc.ir.outputs import Output
from tintc.passes.specializing import OPTIMIZATION_NAMES, OPTIMIZATIONS
from tintc.runtime import slices
from tintc.runtime.batch import Batch
from tintc.runtime.call import Call
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize import frozen
from tintc.runtime.specialize.cost_model import SlotUse

MODELS: dict[str, Builder] = {
    **{
        name: FAMILIES[name].build for name in ("opt", "gpt2", "llama", "bloom", "mpt", "gemma2")
    },  # of OPT and GPT-2 the head is tied
    "tied llama": VARIANTS["llama-all-heads"],
}
PRESETS = ("paper", "exact")
LENGTH, VOCAB = 11, 29
# (scenario, batch): one sequence, several, and several that are padded; each has a training segment
# of its own length.
CALLS = (("ragged", 1), ("ragged", 5), ("padded_left", 5))
FLOAT64, FLOAT32 = torch.float64, torch.float32


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of two or three short sequences and chunks of a few tokens' logits, so that toys have
    several of both.
    """
    monkeypatch.setitem(calibration.FULL_ROWS, "cpu", 3 * LENGTH)
    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", 3 * VOCAB)


@lru_cache(maxsize=4)
def simulator_of(
    name: str, preset: str, steps: int = 1, layers: int | None = None, dtype: torch.dtype = FLOAT64
) -> Simulator:
    config = SimulatorConfig.preset(preset, inner_lr=0.01, steps=steps, layers=layers)
    return simulate(MODELS[name](), config).to(dtype)


def called(
    simulator: Simulator, names: bool | Collection[str], initial: bool = False, **inputs: Tensor
) -> dict[str, Tensor]:
    """What a call under inference mode returns with these optimizations. initial: also what one
    returns that gives logits before the update, whose training pass sees all tokens."""
    simulator.optimizations = names  # type: ignore[assignment]  # the setter takes more than the getter gives
    with torch.inference_mode():
        labelled = simulator(**inputs, labels=inputs["input_ids"])
        both = simulator(**inputs, return_initial=True) if initial else None
    found = {"logits": labelled.logits, "loss": labelled.loss}
    if both is not None:
        found |= {"both.logits": both.logits, "both.initial_logits": both.initial_logits}
    return {key: value for key, value in found.items() if value is not None}


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, kind: str = "all"
) -> None:
    assert set(found) == set(expected)
    limit, said = (
        OPTIMIZED[dtype],
        f"optimizations ({kind}) against none, {str(dtype).removeprefix('torch.')}",
    )
    assert {
        key: e
        for key in expected
        if not (e := measured(said, error(found[key], expected[key]))) < limit
    } == {}


def inputs_of(scenario: str, batch: int) -> dict[str, Tensor]:
    return SCENARIOS[scenario](batch, LENGTH, VOCAB)


# (preset, steps, trained layers)
EVERY = [(preset, steps, layers) for preset in PRESETS for steps in (1, 3) for layers in (None, 1)]
FEW = [("paper", 1, None), ("exact", 3, 1)]
SIZES = dict.fromkeys(MODELS, FEW) | {
    "gpt2": [*FEW, ("paper", 3, 1)],
    "llama": [*FEW, ("exact", 1, None), ("exact", 3, None), ("paper", 3, None)],
}


@some(
    ("name", "preset", "steps", "layers"),
    [(name, *sizes) for name in MODELS for sizes in EVERY],
    default=[(name, *sizes) for name, found in SIZES.items() for sizes in found],
)
def test_all_equal_none(name: str, preset: str, steps: int, layers: int | None) -> None:
    simulator = simulator_of(name, preset, steps, layers)
    for call in CALLS:
        initial = call == ("ragged", 5)
        expected = called(simulator, False, initial, **inputs_of(*call))
        assert_equal(called(simulator, True, initial, **inputs_of(*call)), expected, FLOAT64)
        if initial:
            assert (
                error(expected["logits"], expected["both.initial_logits"]) > 1e-3
            )  # the steps change something


@grid(together=1, name=["opt", "llama", "gemma2"], preset=PRESETS)
def test_all_equal_none_in_float32(name: str, preset: str) -> None:
    """As oneDNN is used: it has no kernels for float64."""
    simulator = simulator_of(name, preset, 3, None, FLOAT32)
    expected = called(simulator, False, **inputs_of("ragged", 5))
    assert_equal(called(simulator, True, **inputs_of("ragged", 5)), expected, FLOAT32)


@some(
    ("name", "preset"),
    [
        ("opt", "exact"),
        ("llama", "paper"),
        ("llama", "exact"),
        ("mpt", "exact"),
        ("gemma2", "exact"),
    ],
    default=[("opt", "exact"), ("llama", "paper")],
)
def test_each_alone(name: str, preset: str) -> None:
    """One optimization on, then one off."""
    simulator = simulator_of(name, preset, 2)
    expected = called(simulator, False, **inputs_of("ragged", 5))
    for one in OPTIMIZATION_NAMES:
        for names in ((one,), tuple(other for other in OPTIMIZATION_NAMES if other != one)):
            assert_equal(
                called(simulator, names, **inputs_of("ragged", 5)), expected, FLOAT64, "each"
            )


@pytest.mark.slow
def test_each_alone_with_padding() -> None:
    simulator = simulator_of("llama", "exact")
    expected = called(simulator, False, **inputs_of("padded_left", 5))
    for one in OPTIMIZATION_NAMES:
        assert_equal(
            called(simulator, (one,), **inputs_of("padded_left", 5)), expected, FLOAT64, "each"
        )


@some(
    ("name", "preset"),
    [("opt", "exact"), ("llama", "paper")],
    default=[("opt", "exact")],
)
@pytest.mark.slow
def test_each_alone_in_float32(name: str, preset: str) -> None:
    simulator = simulator_of(name, preset, 2, None, FLOAT32)
    expected = called(simulator, False, **inputs_of("ragged", 5))
    for one in OPTIMIZATION_NAMES:
        for names in ((one,), tuple(other for other in OPTIMIZATION_NAMES if other != one)):
            assert_equal(
                called(simulator, names, **inputs_of("ragged", 5)), expected, FLOAT32, "each"
            )


@pytest.mark.parametrize(
    "scenario", [name for name in SCENARIOS if name not in ("ragged", "padded_left")]
)
def test_every_kind_of_input(scenario: str) -> None:
    simulator = simulator_of("llama", "exact", 2)
    expected = called(simulator, False, **inputs_of(scenario, 5))
    assert_equal(called(simulator, True, **inputs_of(scenario, 5)), expected, FLOAT64)


@pytest.mark.parametrize("loss_gradient", ["quadratic", "mean_embedding"])
def test_other_losses(loss_gradient: str) -> None:
    simulator = simulate(
        MODELS["gpt2"](), SimulatorConfig.paper(inner_lr=0.01, steps=2, loss_gradient=loss_gradient)
    )
    assert_equal(
        called(simulator, True, **inputs_of("ragged", 5)),
        called(simulator, False, **inputs_of("ragged", 5)),
        FLOAT64,
    )


@grid(name=["opt", "llama"], preset=PRESETS, steps=[1, 3])
def test_low_rank_equals_materialized(
    name: str, preset: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator = simulator_of(name, preset, steps)
    found = {}
    for low_rank in (True, False):
        monkeypatch.setattr(SlotUse, "factors_win", lambda *_, answer=low_rank: answer)
        found[low_rank] = [called(simulator, True, **inputs_of(*call)) for call in CALLS]
        code = code_of(simulator)
        assert ("_low_rank = torch.baddbmm" in code) is low_rank
        assert ("_gradients = torch.cat" in code) is (
            low_rank and steps > 1
        )  # factors of several steps
    for factors, weights in zip(found[True], found[False], strict=True):
        assert_equal(factors, weights, FLOAT64, "low-rank against materialized")


def code_of(simulator: Simulator, wanted: tuple[str, ...] = ("logits",), **inputs: Tensor) -> str:
    """The program that a call of `ragged` inputs under inference mode runs, as Python."""
    prepared = simulator._prepare(Batch(**(inputs or inputs_of("ragged", 2))))
    kinds = tuple(map(Output, wanted))
    call = Call(kinds, prepared.tensors, prepared.segment, prepared.causal)
    with torch.inference_mode():
        module, _ = simulator.bound(call)
    return module.code


# What stands in the program of OPT, exact, three steps, in float32, only when an optimization is
# on.
SIGNS: dict[str, Callable[[str], bool]] = {
    "causal_attention": lambda code: "is_causal = True" in code,
    "flash_attention": lambda code: "flash_attention_for_cpu_backward" in code,
    "low_rank_updates": lambda code: "_gradients = torch.cat" in code,
    "chunk_head": lambda code: "head_gradient(" in code,
    "onednn_products": lambda code: "onednn_product(" in code,
}


@pytest.mark.parametrize("one", SIGNS)
def test_each_is_switched(one: str) -> None:
    simulator = simulator_of("opt", "exact", 3, None, FLOAT32)
    enabled = ("causal_attention", one) if one == "flash_attention" else (one,)
    without = tuple(name for name in OPTIMIZATION_NAMES if name != one)
    for names, expected in ((enabled, True), (without, False), ((), False)):
        simulator.optimizations = names
        assert SIGNS[one](code_of(simulator)) is expected, names


def test_slices_are_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, sizes = simulator_of("opt", "exact"), []
    bound = simulator.bound

    def noted(call: Call) -> Any:
        sizes.append(call.shape[0])
        return bound(call)

    monkeypatch.setattr(simulator, "bound", noted)
    for names, expected in (((slices.NAME,), [3, 2]), ((), [5])):
        simulator.optimizations = names
        with torch.inference_mode():
            simulator(**inputs_of("ragged", 5))
        assert sizes == expected
        sizes.clear()
    simulator.optimizations = OPTIMIZATION_NAMES
    simulator(**inputs_of("ragged", 5))  # a call that may be differentiated runs in one piece
    with torch.inference_mode():
        simulator.updates(**inputs_of("ragged", 5))
    assert sizes == [5, 5]


@grid(together=1, name=["opt", "llama"], preset=PRESETS)
def test_outer_gradients(name: str, preset: str) -> None:
    """A call that is differentiated takes only optimizations that have derivatives, and gives the
    same gradients.
    """
    simulator = copy.deepcopy(simulator_of(name, preset, 2))
    parameters = dict(simulator.named_parameters())
    found = {}
    for names in (False, True):
        simulator.optimizations = names  # type: ignore[assignment]
        loss = simulator(**inputs_of("ragged", 3), labels=inputs_of("ragged", 3)["input_ids"]).loss
        found[names] = dict(
            zip(
                parameters,
                torch.autograd.grad(loss, list(parameters.values()), allow_unused=True),
                strict=True,
            )
        )
    assert float(found[True]["inner_lr"].abs()) > 0
    unused = [key for key, gradient in found[False].items() if gradient is None]
    assert [key for key, gradient in found[True].items() if gradient is None] == unused
    for gradients in found.values():
        for key in unused:
            del gradients[key]
    assert_equal(found[True], found[False], FLOAT64, "outer gradients")


@pytest.mark.slow
def test_updates_are_materialized() -> None:
    """Whoever asks for updated weights gets them, and predicting with them is the same as the
    call.
    """
    simulator = simulator_of("llama", "exact", 3)
    found: dict[bool, dict[str, Tensor]] = {}
    for names in (True, False):
        simulator.optimizations = names  # type: ignore[assignment]
        with torch.inference_mode():
            updates = simulator.updates(**inputs_of("ragged", 5))
            predicted = simulator.predict(updates, inputs_of("ragged", 5)["input_ids"])
            found[names] = {
                **updates,
                "predicted": predicted,
                "called": simulator(**inputs_of("ragged", 5)).logits,
            }
        assert error(predicted, found[names]["called"]) < OPTIMIZED[FLOAT64]
    assert_equal(found[True], found[False], FLOAT64)


def test_names() -> None:
    simulator = simulator_of("opt", "paper")
    simulator.optimizations = True  # type: ignore[assignment]
    assert (
        simulator.optimizations
        == OPTIMIZATION_NAMES
        == (*(step.name for step in OPTIMIZATIONS), slices.NAME, frozen.NAME)
    )
    simulator.optimizations = ["chunk_head", "causal_attention", "chunk_head"]  # type: ignore[assignment]
    assert simulator.optimizations == ("causal_attention", "chunk_head")
    with pytest.raises(
        tintc.UsageError,
        match="there is no optimization nonsense; they are " + ", ".join(OPTIMIZATION_NAMES),
    ):
        simulator.optimizations = ("nonsense",)
    assert simulator.optimizations == ("causal_attention", "chunk_head")
    simulator.optimizations = False  # type: ignore[assignment]
    assert simulator.optimizations == ()


def test_the_transformer_has_none() -> None:
    simulator = simulate(MODELS["opt"](), SimulatorConfig.paper(), backend="transformer")
    assert simulator.optimizations == ()
    simulator.optimizations = True  # type: ignore[assignment]
    with torch.inference_mode():
        assert bool(
            simulator(tokens(1, LENGTH, VOCAB), torch.ones(1, LENGTH)).logits.isfinite().all()
        )
    assert simulator.optimizations == ()
