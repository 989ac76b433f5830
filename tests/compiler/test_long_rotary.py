"""Rotary frequencies that depend on the length of the call (`dynamic`, `longrope`): each pass of a
simulator has those of a call of its own tokens, as the first call of Hugging Face's module.

Training is a call of the training segment alone, the last pass one of the whole text; both are
tried below, at and above the length that the model was made for (`long_rotary.ORIGINAL`).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tintc
from tests.oracle.reference import call as called_as_is
from tests.support.grid import some
from tests.support.long_rotary import (
    DYNAMIC,
    EXACT,
    LONG,
    LONGROPE,
    ORIGINAL,
    PAPER,
    first_call,
    model,
    short_simulator,
    simulator,
    stepped,
    tokens_of,
    trained,
)
from tests.support.tolerances import CASTS, SIMULATOR, error, measured
from tintc import SimulatorConfig
from tintc.compiler.casts import no_casts
from tintc.runtime.simulator import Simulator

LIMIT = SIMULATOR[torch.float64]
# tokens of the text and of its training segment: below, at and above ORIGINAL
LENGTHS = [(7, 4), (10, 6), (11, 10), (13, 8), (14, 11), (24, 15)]


def assert_steps_as_autograd(name: str, config: SimulatorConfig, length: int, train: int) -> None:
    sim, ids = simulator(name, config), tokens_of(2, length)
    with torch.inference_mode():
        out = sim(ids, trained(2, length, train), return_initial=True)
    assert out.initial_logits is not None
    for b in range(2):
        with no_casts():
            initial, final = stepped(model(name), config, ids[b], train)
        assert error(initial, final) > 1e-3, "the steps say nothing"
        assert measured("by length: initial", error(out.initial_logits[b], initial)) < LIMIT
        assert measured("by length: after steps", error(out.logits[b], final)) < LIMIT


@some(
    ("name", "length", "train"),
    [(name, *lengths) for name in LONG for lengths in LENGTHS],
    default=[(DYNAMIC, *LENGTHS[-1]), (LONGROPE, *LENGTHS[2])],
)
def test_exact(name: str, length: int, train: int) -> None:
    assert_steps_as_autograd(name, EXACT, length, train)


@pytest.mark.slow
@some(
    ("name", "length", "train"),
    [(name, *lengths) for name in LONG for lengths in LENGTHS],
    default=[(LONGROPE, 24, 15)],
)
def test_paper(name: str, length: int, train: int) -> None:
    assert_steps_as_autograd(name, PAPER, length, train)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_the_length_matters(name: str) -> None:
    """So that a wrong one shows: the first tokens of a long call are not those of a short one, and
    their values are the model's own as it is, casts included.
    """
    weights, ids = dict(model(name).named_parameters()), tokens_of(24)
    short, long = (first_call(model(name), weights, ids[:n]) for n in (ORIGINAL, 24))
    assert error(long[:ORIGINAL], short) > 1e-3
    sim = short_simulator(copy.deepcopy(model(name)), EXACT)
    for n, expected in ((ORIGINAL, short), (24, long)):
        assert error(sim.predict_initial(ids[None, :n])[0], expected) < CASTS


@pytest.mark.parametrize("name", [DYNAMIC, LONGROPE])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_are_as_they_are_alone(name: str, side: str) -> None:
    """A batch of texts below and above the original length; trained segments of lengths of their
    own. Padding has no position.
    """
    sim, texts = simulator(name), [(6, 4), (14, 8), (19, 13)]
    ids, seen, train = (torch.zeros(3, 19, dtype=torch.int64) for _ in range(3))
    places = []
    for b, (length, segment) in enumerate(texts):
        first = 19 - length if side == "left" else 0
        places.append(slice(first, first + length))
        ids[b, places[b]] = tokens_of(length, seed=b)
        seen[b, places[b]] = 1
        train[b, first : first + segment] = 1
    with torch.inference_mode():
        out = sim(ids, train, attention_mask=seen, return_initial=True)
        one_at_a_time = sim.losses(ids, train, ids, attention_mask=seen, predict="rest")
    for b, (_, segment) in enumerate(texts):
        with no_casts():
            initial, final = stepped(model(name), EXACT, ids[b, places[b]], segment)
        assert out.initial_logits is not None
        assert error(out.initial_logits[b, places[b]], initial) < LIMIT
        assert error(out.logits[b, places[b]], final) < LIMIT
        losses = F.cross_entropy(final[:-1], ids[b, places[b]][1:], reduction="none")
        found = one_at_a_time.losses[b, places[b]][:-1]
        assert error(found[segment - 1 :], losses[segment - 1 :]) < LIMIT


def test_the_training_segment_is_what_train_mask_says() -> None:
    """`loss_mask` narrows the targets, not the call that they are trained in."""
    ids, train = tokens_of(1, 14), trained(1, 14, 12)
    targets = (torch.arange(14) < 5)[None]
    with torch.inference_mode():
        found = simulator(DYNAMIC)(ids, train, loss_mask=targets.long()).logits[0]
    with no_casts():
        _, final = stepped(model(DYNAMIC), EXACT, ids[0], 12, targets[0])
        _, shorter = stepped(model(DYNAMIC), EXACT, ids[0], 5)
    assert error(found, final) < LIMIT < error(found, shorter)


@pytest.mark.parametrize("name", [DYNAMIC, LONGROPE])
def test_the_length_is_the_greatest_position(name: str) -> None:
    """Of positions that the caller gives, as Hugging Face has it: few tokens far out."""
    ids, positions = tokens_of(1, 6), torch.arange(6)[None] + 8
    weights = dict(model(name).named_parameters())
    allowed = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with no_casts(), torch.no_grad():
        far = called_as_is(copy.deepcopy(model(name)), weights, ids, allowed, positions)
        near = first_call(model(name), weights, ids[0])
    found = simulator(name).predict_initial(ids, position_ids=positions)
    assert error(found, far) < LIMIT < error(found[0], near)


def attributes(module: nn.Module) -> list[dict[str, Any]]:
    """Of every part, tensors by their numbers."""
    return [
        {
            name: (id(value), value.clone()) if isinstance(value, Tensor) else value
            for held in (vars(part), part._buffers)
            for name, value in held.items()
        }
        for part in module.modules()
    ]


class TestTheModule:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", [DYNAMIC, LONGROPE])
    def test_is_left_as_it_was(self, name: str) -> None:
        own = LONG[name]()
        own(tokens_of(1, 24), use_cache=False)  # its tables are those of 24 tokens
        before = attributes(own)
        tintc.compile(own, EXACT, check="step")
        after = attributes(own)
        assert len(before) == len(after)
        for then, now in zip(before, after, strict=True):
            assert then.keys() == now.keys()
            for key, value in then.items():
                if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Tensor):
                    assert value[0] == now[key][0] and torch.equal(value[1], now[key][1])
                else:
                    assert value is now[key] or value == now[key]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [DYNAMIC, LONGROPE])
    def test_its_earlier_calls_change_nothing(self, name: str) -> None:
        """Casts included: without them the module's own call would leave other numbers in it."""
        own, ids, train = LONG[name](), tokens_of(2, 13), trained(2, 13, 8)
        own(tokens_of(1, 24), use_cache=False)
        found, expected = (short_simulator(each, EXACT)(ids, train) for each in (own, LONG[name]()))
        assert torch.equal(found.logits, expected.logits)


def ways(name: str) -> dict[str, tuple[Simulator, SimulatorConfig]]:
    """Other ways to run: without optimizations, one sequence at a time, and in a loop over steps
    with frozen blocks.
    """
    plain = simulator(name)
    deep = dataclasses.replace(EXACT, steps=6, layers=1)
    top = dataclasses.replace(EXACT, layers=1)
    tensors = plain.prefix.tensors()
    return {
        "plain": (Simulator(plain.program, tensors, optimize=False), EXACT),
        "slices": (Simulator(plain.program, tensors, memory="lowest"), EXACT),
        "frozen blocks": (simulator(name, top), top),
        "loop": (simulator(name, deep), deep),
    }


@some(
    ("name", "way"),
    [
        (name, way)
        for name in (DYNAMIC, LONGROPE)
        for way in ("plain", "slices", "frozen blocks", "loop")
    ],
    default=[(DYNAMIC, "loop"), (LONGROPE, "slices")],
)
def test_however_it_runs(name: str, way: str) -> None:
    sim, config = ways(name)[way]
    ids, train = tokens_of(3, 14), trained(3, 14, 8)
    with torch.inference_mode():
        out = sim(ids, train, return_initial=True)
        last = sim(ids, train, logits_to_keep=2).logits
    assert out.initial_logits is not None
    for b in range(3):
        with no_casts():
            initial, final = stepped(model(name), config, ids[b], 8)
        assert error(out.initial_logits[b], initial) < LIMIT
        assert error(out.logits[b], final) < LIMIT
        assert error(last[b], final[-2:]) < LIMIT


def test_it_can_be_trained_from_outside() -> None:
    """The gradient of an outer loss by the inner rate, against a difference."""
    sim, ids, train = copy.deepcopy(simulator(DYNAMIC)), tokens_of(1, 14), trained(1, 14, 8)

    def loss() -> Tensor:
        return F.cross_entropy(sim(ids, train).logits[0, 8:-1], ids[0, 9:])

    (found,) = torch.autograd.grad(loss(), sim.inner_lr)
    values = []
    for change in (1e-5, -1e-5):
        sim.inner_lr.data.add_(change)
        with torch.no_grad():
            values.append(float(loss()))
        sim.inner_lr.data.sub_(change)
    assert float(found) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
