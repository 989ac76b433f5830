"""predict='rest': the positions that predict what is not trained on, as predict='all' has them."""

from __future__ import annotations

from functools import lru_cache
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
from tests.support.once import compiling_once
from tests.support.outer import assert_same_gradients
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

BATCH, LENGTH, VOCAB = 4, 11, 29
LIMIT = 1e-9  # of rounding, in float64
NAMES = ("opt", "gpt2", "llama", "bloom", "mpt", "gemma2", "falcon_grouped", "cohere", "phi")
CONFIGS = {
    "paper": SimulatorConfig.paper(inner_lr=0.01),
    "exact, 2 steps": SimulatorConfig.exact(inner_lr=0.01, steps=2),
    "top block": SimulatorConfig.paper(inner_lr=0.01, layers=1),
    "a loop": SimulatorConfig.exact(inner_lr=0.01, steps=6, momentum=0.5),
    "adam": SimulatorConfig.exact(inner_lr=0.01, optimizer="adam"),
}


@lru_cache(maxsize=8)
def simulator_of(name: str, config: str, backend: str = "fused") -> Simulator:
    with compiling_once():
        return simulate(FAMILIES[name].build(), CONFIGS[config], backend=backend)


def first_of_rest(inputs: dict[str, Tensor]) -> int:
    """By a loop over sequences: the last training token that is no padding."""
    first = LENGTH
    for row, train in enumerate(inputs["train_mask"]):
        mask = inputs.get("attention_mask")
        valid = torch.ones(LENGTH, dtype=torch.bool)
        if mask is not None:
            valid = mask[row] != 0
            valid = (valid.tril() if valid.ndim == 2 else valid[None]).any(0)
        trained = [t for t in range(LENGTH) if train[t] and valid[t]]
        first = min(first, trained[-1] if trained else 0)
    return first


def both(simulator: Simulator, inputs: dict[str, Tensor], **more: Any) -> tuple[Any, Any]:
    with torch.inference_mode():
        return simulator(**inputs, **more), simulator(**inputs, predict="rest", **more)


@grid(together=1, name=NAMES, scenario=SCENARIOS, config=CONFIGS)
def test_equals_all_on_the_rest(name: str, scenario: str, config: str) -> None:
    inputs = SCENARIOS[scenario](BATCH, LENGTH, VOCAB)
    simulator = simulator_of(name, config)
    every, rest = both(simulator, inputs)
    first = first_of_rest(inputs)
    assert rest.logits.shape == (BATCH, LENGTH - first, VOCAB)
    assert error(rest.logits, every.logits[:, first:]) < LIMIT
    labels = inputs["input_ids"].clone()
    labels[:, : first + 1] = -100
    if bool((labels != -100).any()):
        with torch.inference_mode():
            wanted = simulator.losses(**inputs, labels=labels, return_initial=True)
            found = simulator.losses(
                **inputs, labels=inputs["input_ids"], return_initial=True, predict="rest"
            )
        assert found.losses.shape == (BATCH, LENGTH)
        for kind in ("losses", "initial_losses", "loss"):
            assert error(getattr(found, kind), getattr(wanted, kind)) < LIMIT


@grid(together=1, scenario=["ragged", "padded_left", "demonstrations"], switched=["off", "on"])
def test_forced_both_ways(scenario: str, switched: str) -> None:
    """The head at the rest alone, and all of the last block: the same numbers."""
    simulator = simulator_of("llama", "exact, 2 steps")
    inputs = SCENARIOS[scenario](BATCH, LENGTH, VOCAB)
    expected = both(simulator, inputs)[0].logits
    names = [n for n in tintc.OPTIMIZATION_NAMES if switched == "on" or n != "kept_first"]
    simulator.optimizations = tuple(names)
    try:
        found = both(simulator, inputs)[1].logits
    finally:
        simulator.optimizations = tintc.OPTIMIZATION_NAMES
    assert error(found, expected[:, first_of_rest(inputs) :]) < LIMIT


def test_losses_beside_logits() -> None:
    """The mean over the labels of the rest; no head runs twice for it."""
    simulator = simulator_of("opt", "paper").requires_grad_(False)
    inputs = SCENARIOS["ragged"](BATCH, LENGTH, VOCAB)
    first = first_of_rest(inputs)
    labels = inputs["input_ids"].clone()
    labels[:, : first + 1] = -100
    wanted = both(simulator, inputs, labels=labels, return_initial=True)[0]
    counts = []
    for given in ({}, {"labels": inputs["input_ids"]}):
        with counting() as counter, sdpa_kernel(SDPBackend.MATH):
            found = both(simulator, inputs, return_initial=True, **given)[1]
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert error(found.loss, wanted.loss) < LIMIT
    assert error(found.initial_loss, wanted.initial_loss) < LIMIT
    assert error(found.initial_logits, wanted.initial_logits[:, first:]) < LIMIT


def test_an_outer_loss_reaches_weights_and_rate() -> None:
    simulator = simulator_of("llama", "exact, 2 steps")
    inputs = SCENARIOS["padded_left"](BATCH, LENGTH, VOCAB)
    rest = simulator(**inputs, predict="rest").logits
    every = simulator(**inputs).logits[:, first_of_rest(inputs) :]
    assert_same_gradients(simulator, every, rest, LIMIT)


def test_the_transformer_back_end() -> None:
    simulator = simulator_of("opt", "paper", "transformer")
    inputs = SCENARIOS["ragged"](BATCH, LENGTH, VOCAB)
    every, rest = both(simulator, inputs)
    first = first_of_rest(inputs)
    assert error(rest.logits, every.logits[:, first:]) < LIMIT
    with torch.inference_mode():
        losses = simulator.losses(**inputs, labels=inputs["input_ids"], predict="rest")
        wanted = simulator.losses(**inputs, labels=inputs["input_ids"])
    assert error(losses.losses[:, first:], wanted.losses[:, first:]) < LIMIT
    assert not losses.losses[:, :first].any()


def test_a_batch_in_slices() -> None:
    simulator = simulator_of("opt", "paper")
    simulator.memory = "lowest"
    inputs = SCENARIOS["ragged"](5, LENGTH, VOCAB)
    every, rest = both(simulator, inputs)
    assert error(rest.logits, every.logits[:, -rest.logits.shape[1] :]) < LIMIT


def test_what_it_saves() -> None:
    """Of the last pass over T tokens, S + 1 trained, in the top block alone: the head, the queries,
    their product with keys and values, the output and the feed-forward layers at S positions.
    """
    hidden, ffn, vocab, length, trained = 12, 20, 29, 24, 10
    model = opt(hidden=hidden, ffn=ffn, vocab=vocab, layers=3, positions=32)
    simulator = simulate(model, SimulatorConfig.exact(inner_lr=0.01)).requires_grad_(False)
    simulator.optimizations = ("kept_first", "chunk_head")
    ids, mask = tokens(1, length, vocab), (torch.arange(length) < trained).long()[None]
    counts = []
    for predict in ("all", "rest"):
        counter = counting()
        with counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            simulator(ids, mask, predict=predict)
        counts.append(counter.get_total_flops())
    left_out = trained - 1  # the last training token predicts the first of the rest
    products = 2 * left_out * (2 * hidden**2 + 2 * hidden * ffn + hidden * vocab)
    attention = 2 * 2 * left_out * length * hidden
    assert counts[0] - counts[1] == products + attention


class TestBadInput:
    def refused(self, message: str, **given: Any) -> None:
        simulator = simulator_of("opt", "paper")
        inputs = SCENARIOS["ragged"](2, LENGTH, VOCAB)
        with pytest.raises(tintc.InputError, match=message):
            simulator(**{**inputs, **given})

    def test_another_word(self) -> None:
        self.refused("predict is 'some'; expected 'all' or 'rest'", predict="some")

    def test_two_ways_to_say_it(self) -> None:
        self.refused("leave logits_to_keep out", predict="rest", logits_to_keep=2)

    def test_labels_of_the_training_segment_alone(self) -> None:
        labels = torch.full((2, LENGTH), -100)
        labels[:, 1] = 3
        self.refused(
            "no target behind the training segment", predict="rest", labels=labels,
            train_mask=(torch.arange(LENGTH) < 5).long().expand(2, -1),
        )  # fmt: skip

    def test_masks_without_numbers(self) -> None:
        inputs = {k: v.to("meta") for k, v in SCENARIOS["ragged"](2, LENGTH, VOCAB).items()}
        simulator = simulate(opt(), CONFIGS["paper"]).to("meta")
        with pytest.raises(tintc.InputError, match="pass logits_to_keep with the positions"):
            simulator(**inputs, predict="rest")
        assert simulator(**inputs).logits.shape == (2, LENGTH, VOCAB)


def test_nothing_trained_is_all_of_it() -> None:
    inputs = SCENARIOS["ragged"](3, LENGTH, VOCAB)
    inputs["train_mask"][1] = 0
    with pytest.warns(UserWarning, match="no training target"):
        every, rest = both(simulate(opt(), CONFIGS["paper"]), inputs)
    assert rest.logits.shape == every.logits.shape
    assert first_of_rest(inputs) == 0


@pytest.mark.parametrize("backend", ["fused", "transformer"])
def test_losses_begin_at_the_first_label(backend: str) -> None:
    """What `losses` is asked for says what it leaves out; 0 stands there."""
    simulator = simulator_of("opt", "paper", backend).requires_grad_(False)
    inputs = SCENARIOS["ragged"](3, LENGTH, VOCAB)
    labels, counts = inputs["input_ids"], []
    with torch.inference_mode():
        every = simulator.losses(**inputs, labels=labels)
        for first in (1, 7):
            some = labels.masked_fill(torch.arange(LENGTH) < first, -100)
            counter = counting()
            with counter, sdpa_kernel(SDPBackend.MATH):
                found = simulator.losses(**inputs, labels=some)
            counts.append(counter.get_total_flops())
            assert error(found.losses[:, first - 1 :], every.losses[:, first - 1 :]) < LIMIT
            assert not found.losses[:, : first - 1].any()
    assert counts[1] < counts[0] or backend == "transformer"
