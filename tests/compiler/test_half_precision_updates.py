"""Half precision follows the float64 updates: their direction, and what they do to the logits, with
all optimizations on.

Which forms make that so (`ir/precision.py`, `norm.py`, `activation.py`): norms, activations'
derivatives, softmax and losses are float32 islands, widened on entry and rounded once on leaving.
Inside, `paper`'s finite differences are not subtracted: a norm's is the exact formula of f(x + d) -
f(x) without cancellation, ReLU's is piecewise linear, and a smooth activation's is a'(x) d + a''(x)
d^2 / 2. `exact` has closed forms. Products and sums of residuals are of the half type, as on a GPU:
a CPU computes in float32. That small updates are not rounded away: `test_half_precision_learns.py`.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import tintc
from tests.support.families import FAMILIES
from tests.support.grid import grid
from tests.support.models import simulate, tokens
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import UPDATE_COSINE, UPDATE_COSINE_HALF, cosine
from tintc.ir.config import SimulatorConfig
from tintc.ir.ops.linear import prefix
from tintc.passes.specializing import OPTIMIZATION_NAMES
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize import programs
from tintc.runtime.specialize.cost_model import SlotUse

LIMITS = {
    torch.float32: UPDATE_COSINE,
    torch.float16: UPDATE_COSINE_HALF,
    torch.bfloat16: UPDATE_COSINE_HALF,
}
INPUTS = SCENARIOS["ragged"](3, 11, 29)
NAMES = ("opt", "gpt2", "llama", "gemma2")


@lru_cache(maxsize=8)
def float64_simulator(name: str, preset: str) -> Simulator:
    return simulate(FAMILIES[name].build(), SimulatorConfig.preset(preset, inner_lr=0.03))


def both(name: str, preset: str, dtype: torch.dtype) -> tuple[Simulator, Simulator]:
    """(a simulator of that type, one in float64 that has the same, rounded weights)."""
    low = copy.deepcopy(float64_simulator(name, preset)).to(dtype)
    assert low.optimizations == OPTIMIZATION_NAMES
    return low, copy.deepcopy(low).double()


@pytest.fixture(autouse=True)
def _in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "computed_dtype", lambda stored, device: stored)


def change_of_weights(simulator: Simulator, **inputs: Tensor) -> Tensor:
    """Updated slots less what they were, of all slots and sequences in one vector."""
    tensors, slots, parts = simulator.prefix.tensors(), simulator.program.layout.prefix, []
    with torch.inference_mode():
        for name, updated in simulator.updates(**inputs).items():
            slot = slots[name]
            before = prefix(
                tensors[slot.parameter],
                slot.rows.start,
                slot.rows.stop,
                slot.rows.period,
                slot.transpose,
            )
            parts.append((updated.double() - before.double()).flatten())
    return torch.cat(parts)


def change_of_logits(simulator: Simulator, **inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        out = simulator(**inputs, return_initial=True)
    assert out.initial_logits is not None
    return out.logits.double() - out.initial_logits.double()


@grid(name=NAMES, preset=["paper", "exact"], dtype=LIMITS)
def test_direction_of_the_update(name: str, preset: str, dtype: torch.dtype) -> None:
    """Materialized updates of float32 islands (see above) point where the float64 ones do, and are
    as long.
    """
    low, high = (change_of_weights(simulator, **INPUTS) for simulator in both(name, preset, dtype))
    assert cosine(low, high) >= LIMITS[dtype]
    assert abs(float(low.norm() / high.norm()) - 1) < 0.02


@grid(name=["opt", "llama"], preset=["paper", "exact"], dtype=LIMITS, low_rank=[True, False])
def test_effect_on_the_logits(
    name: str, preset: str, dtype: torch.dtype, low_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors are kept in the half type, own weights in float32; both are summed in float32."""
    monkeypatch.setattr(SlotUse, "factors_win", lambda *_: low_rank)
    low, high = (change_of_logits(simulator, **INPUTS) for simulator in both(name, preset, dtype))
    assert float(high.abs().max()) > 1  # logits here are of order 1
    assert cosine(low, high) >= LIMITS[dtype]


@lru_cache(maxsize=2)
def bundled(preset: str) -> Simulator:
    return tintc.compile("tiny-opt", SimulatorConfig.preset(preset, inner_lr=1.0))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("preset", ["paper", "exact"])
def test_a_trained_model(preset: str, dtype: torch.dtype) -> None:
    """The bundled model, whose gradients have real sizes. One step is linear in its rate, so a rate
    of 1 changes no direction but lifts the update above the weights' own rounding. torch.autograd
    on the model itself in bfloat16 has a cosine of 0.994."""
    low = copy.deepcopy(bundled(preset)).to(dtype)
    ids = tokens(1, 96, low.program.facts.vocab_size)
    inputs = {"input_ids": ids, "train_mask": (torch.arange(96) < 48).long()[None]}
    found, expected = (
        change_of_weights(simulator, **inputs) for simulator in (low, copy.deepcopy(low).double())
    )
    assert cosine(found, expected) >= LIMITS[dtype]
