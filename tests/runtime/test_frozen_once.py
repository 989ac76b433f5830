"""A loop over steps computes once what none of them changes: frozen blocks below the first that
learns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tintc
from tests.support.families import FAMILIES
from tests.support.flops import counting
from tests.support.models import opt, simulate, tokens
from tests.support.outer import assert_same_gradients
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize import frozen

LENGTH, VOCAB = 11, 29
LIMIT = 1e-9  # of rounding, in float64
CONFIGS: dict[str, dict[str, Any]] = {
    "top block": {"layers": 1},
    "momentum": {"layers": 1, "momentum": 0.5, "schedule": "linear"},
    "one kind of weight": {"train": ("*.1.self_attn.o*_proj.weight",)},
}


def config(name: str) -> SimulatorConfig:
    return SimulatorConfig.exact(inner_lr=0.01, steps=6, **CONFIGS[name])


def switched(simulator: Simulator, on: bool) -> Simulator:
    names = [n for n in tintc.OPTIMIZATION_NAMES if on or n != frozen.NAME]
    simulator.optimizations = tuple(names)
    assert simulator.shares_frozen is on
    return simulator


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_forced_both_ways(family: str, name: str) -> None:
    simulator = simulate(FAMILIES[family].build(), config(name))
    inputs = SCENARIOS["padded_left"](3, LENGTH, VOCAB)
    found: list[dict[str, Tensor]] = []
    for on in (False, True):
        with torch.inference_mode():
            out = switched(simulator, on)(**inputs, return_initial=True)
            updates = simulator.updates(**inputs)
        assert out.initial_logits is not None
        found.append({"logits": out.logits, "initial": out.initial_logits, **updates})
    assert {k: e for k in found[0] if not (e := error(found[1][k], found[0][k])) < LIMIT} == {}


@pytest.mark.parametrize("keys", ["recompute", "cache"])
def test_a_stream(keys: Any) -> None:
    simulator, ids, found = simulate(opt(), config("top block")), tokens(2, 15, VOCAB), []
    for on in (False, True):
        stream = switched(simulator, on).stream(2, chunk=4, context=5, keys=keys)
        losses = [stream.step(ids[:, part]).losses for part in (slice(5), slice(5, 9))]
        found.append(torch.cat(losses, 1)[:, 1:])
    assert error(found[1], found[0]) < LIMIT


def test_an_outer_loss_reaches_frozen_weights() -> None:
    simulator = simulate(opt(), config("top block"))
    inputs = SCENARIOS["ragged"](2, LENGTH, VOCAB)
    off, on = (switched(simulator, on)(**inputs).logits for on in (False, True))
    assert_same_gradients(simulator, off, on, LIMIT)


def test_what_it_saves() -> None:
    """Of 6 steps and the prediction all passes but one through two blocks."""
    hidden, ffn, length = 12, 20, 16
    model = opt(hidden=hidden, ffn=ffn, vocab=VOCAB, layers=3)
    simulator = simulate(model, config("top block")).requires_grad_(False)
    ids, mask = tokens(1, length, VOCAB), (torch.arange(length) < 7).long()[None]
    counts = []
    for on in (False, True):
        switched(simulator, on)
        counter = counting()
        simulator.optimizations = tuple(
            n for n in simulator.optimizations if n in (frozen.NAME, "chunk_head")
        )
        with counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            simulator(ids, mask)
        counts.append(counter.get_total_flops())
    block = 2 * length * (4 * hidden**2 + 2 * hidden * ffn) + 2 * 2 * length**2 * hidden
    assert counts[0] - counts[1] == 6 * 2 * block


def test_nothing_to_share() -> None:
    """All blocks learn, or the graph holds all steps."""
    every = simulate(opt(), SimulatorConfig.exact(steps=6))
    few = simulate(opt(), SimulatorConfig.exact(steps=2, layers=1))
    assert not every.shares_frozen and not few.shares_frozen
