"""Calls whose loss stands at few positions: the same as where it is looked for everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tintc
from tests.support.families import FAMILIES
from tests.support.flops import counting
from tests.support.grid import grid
from tests.support.models import opt, simulate, tokens
from tests.support.outer import assert_same_gradients
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

BATCH, LENGTH, VOCAB = 4, 11, 29
LIMIT = 1e-9  # of rounding, in float64
CONFIGS = {
    "paper": SimulatorConfig.paper(inner_lr=0.01, steps=2),
    "exact": SimulatorConfig.exact(inner_lr=0.01),
    "top block": SimulatorConfig.exact(inner_lr=0.01, layers=1, steps=2),
    "a loop": SimulatorConfig.exact(inner_lr=0.01, steps=6, momentum=0.5),
    "adam": SimulatorConfig.exact(inner_lr=0.01, optimizer="adam"),
    "clipped": SimulatorConfig.exact(inner_lr=0.01, clip_norm=0.1, steps=2),
}


def given(scenario: str, batch: int = BATCH) -> dict[str, Tensor]:
    """Loss at two positions of the segment, of which a sequence has one or both."""
    inputs = SCENARIOS[scenario](batch, LENGTH, VOCAB)
    mask = torch.zeros(batch, LENGTH, dtype=torch.long)
    mask[:, 2], mask[::2, 4] = 1, 1
    inputs["train_mask"] = (torch.arange(LENGTH) < 7).long().expand(batch, -1)
    return {**inputs, "loss_mask": mask}


def without(simulator: Simulator, *names: str) -> Simulator:
    simulator.optimizations = tuple(n for n in tintc.OPTIMIZATION_NAMES if n not in names)
    return simulator


@grid(
    together=1,
    name=["opt", "llama", "gemma2", "bloom"],
    scenario=["ragged", "padded_left", "padded_right", "demonstrations"],
    config=CONFIGS,
)
def test_forced_both_ways(name: str, scenario: str, config: str) -> None:
    simulator = simulate(FAMILIES[name].build(), CONFIGS[config])
    inputs, found = given(scenario), []
    for off in ((), ("scored_loss",), ("scored_loss", "kept_first")):
        with torch.inference_mode():
            out = without(simulator, *off)(**inputs)
            updates = simulator.updates(**inputs)
        found.append({"logits": out.logits, **updates})
    for other in found[1:]:
        assert {k: e for k in other if not (e := error(found[0][k], other[k])) < LIMIT} == {}
    with torch.inference_mode():
        before = simulator.predict_initial(inputs["input_ids"], inputs.get("attention_mask"))
    assert scenario == "demonstrations" or error(found[0]["logits"], before) > 1e-6


@pytest.mark.parametrize("form", ["weights", "factors"])
def test_adapting(form: Any) -> None:
    """Factors are of all training tokens; own weights of those that count."""
    simulator, inputs = simulate(opt(), CONFIGS["paper"]), given("ragged")
    expected = without(simulator, "scored_loss").adapt(**inputs, form=form)
    found = without(simulator).adapt(**inputs, form=form)
    ids = inputs["input_ids"]
    assert error(found(ids).logits, expected(ids).logits) < LIMIT


def test_an_outer_loss_reaches_weights_and_rate() -> None:
    simulator, inputs = simulate(opt(), CONFIGS["exact"]), given("ragged")
    on = without(simulator)(**inputs).logits
    off = without(simulator, "scored_loss", "kept_first")(**inputs).logits
    assert_same_gradients(simulator, off, on, LIMIT)


def test_what_it_saves() -> None:
    """Of a pass over S tokens with loss at L: the head there and back, and of the top block the
    feed-forward layers, the output and the queries, with their products with keys and values.
    """
    hidden, ffn, vocab, segment, scored = 12, 20, 29, 12, 3
    model = opt(hidden=hidden, ffn=ffn, vocab=vocab, layers=3, positions=32)
    simulator = simulate(model, SimulatorConfig.paper(inner_lr=0.01)).requires_grad_(False)
    ids, train = tokens(1, 24, vocab), (torch.arange(24) <= segment).long()[None]
    mask = torch.zeros(1, 24, dtype=torch.long)
    mask[0, [2, 7, segment]] = 1
    counts = []
    for names in ((), ("scored_loss", "kept_first")):
        simulator.optimizations = names
        counter = counting()
        with counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            simulator.updates(ids, train, mask)
        counts.append(counter.get_total_flops())
    left_out = segment - scored
    head = 2 * 2 * hidden * vocab  # forward and back
    layers = 3 * 2 * (hidden**2 + 2 * hidden * ffn)  # forward, back, descent
    queries = 2 * hidden**2  # nothing goes back into them
    attention = 2 * 2 * segment * hidden + 2 * 2 * segment * hidden  # forward, and values back
    assert counts[0] - counts[1] == left_out * (head + layers + queries + attention)


def test_loss_at_most_positions_is_looked_for_everywhere() -> None:
    """A few positions more cost less than the copies."""
    simulator = simulate(opt(), CONFIGS["paper"])
    inputs = SCENARIOS["ragged"](BATCH, LENGTH, VOCAB)
    with torch.inference_mode():
        plain = simulator(**inputs).logits
        inputs["loss_mask"] = torch.ones_like(inputs["input_ids"])
        assert torch.equal(simulator(**inputs).logits, plain)
    assert simulator._prepare(tintc.runtime.batch.Batch(**inputs)).scored is None
    assert simulator._prepare(tintc.runtime.batch.Batch(**given("ragged"))).scored is not None
