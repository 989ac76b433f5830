"""Streams against autograd and torch.optim (tests/oracle/streaming.py), in float64: scores and
weights, every rule, both ways to keep keys.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.streaming import streamed
from tests.support.every import captured, model_of
from tests.support.grid import grid
from tests.support.models import tokens
from tests.support.rules import ALONE
from tests.support.tolerances import SIMULATOR, error, measured
from tintc.compiler.casts import no_casts
from tintc.compiler.driver import lower
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.runtime.reading import Rows
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.streaming import Stream

MODELS = ("opt", "gpt2", "llama")
VOCAB, CHUNK, CONTEXT = 29, 3, 5
LIMIT = SIMULATOR[torch.float64]
LENGTHS = (19, 14, 7, 2)  # a ragged last chunk, a whole one, and a document of one target
RATE = 0.002


@cache
def simulator_of(name: str, config: SimulatorConfig, backend: str = "fused") -> Simulator:
    graph = captured(name, True)
    return Simulator(lower(graph.copy(), config), dict(graph.tensors), backend=backend)


def documents() -> list[Tensor]:
    return [tokens(1, n, VOCAB - 1, seed=n)[0] + 1 for n in LENGTHS]


def padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, mask), padding on the right of the first and on the left of the others."""
    length = max(map(len, texts))
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if row == 0 else slice(length - len(text), length)
        ids[row, where] = text
    return ids, (ids != 0).long()


def assert_streams(name: str, config: SimulatorConfig, keys: str, backend: str = "fused") -> None:
    simulator, texts = simulator_of(name, config, backend), documents()
    ids, mask = padded(texts)
    found = simulator.score_first(
        ids,
        mask,
        chunk=CHUNK,
        context=CONTEXT,
        keys=keys,
        unmodified=True,  # type: ignore[arg-type]
    )
    with no_casts():
        expected = streamed(
            model_of(name), config, texts, updated_parameters(simulator), chunk=CHUNK,
            context=CONTEXT, keys=keys, longest=simulator.program.facts.longest,
        )  # fmt: skip
    assert found.unmodified_losses is not None
    for row, losses in enumerate(expected.losses):
        real = mask[row, 1:].bool() & mask[row, :-1].bool()
        off = measured(f"streams against autograd, {keys}", error(found.losses[row, real], losses))
        assert off < LIMIT
        assert bool(found.losses[row, ~real].isnan().all())
        if len(losses) > CHUNK:
            assert error(found.unmodified_losses[row, real], losses) > 1e-4


@grid(together=1, name=MODELS, keys=["recompute", "cache"], rule=["sgd", *ALONE])
def test_every_rule(name: str, keys: str, rule: str) -> None:
    assert_streams(name, SimulatorConfig.exact(inner_lr=RATE, **ALONE.get(rule, {})), keys)


@pytest.mark.parametrize("keys", ["recompute", "cache"])
@pytest.mark.parametrize("steps", [2, 6])
def test_several_steps(steps: int, keys: str) -> None:
    fields: dict[str, Any] = {"schedule": "linear", "momentum": 0.9}
    assert_streams("llama", SimulatorConfig.exact(inner_lr=RATE, steps=steps, **fields), keys)


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.slow
def test_a_schedule_whose_first_factor_is_not_one(steps: int) -> None:
    schedule = (0.25, 2.0, *[0.5] * (steps - 2))
    config = SimulatorConfig.exact(inner_lr=RATE, steps=steps, schedule=schedule)
    assert_streams("opt", config, "recompute")


def test_paper() -> None:
    assert_streams("opt", SimulatorConfig.paper(inner_lr=RATE), "recompute")


def test_the_transformer_back_end() -> None:
    assert_streams("gpt2", SimulatorConfig.exact(inner_lr=RATE), "recompute", "transformer")


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("opt", 3)])
def test_what_a_stream_has_learned(name: str, batch: int) -> None:
    """The weights of the oracle, and logits under them; later steps leave them alone."""
    config = SimulatorConfig.exact(inner_lr=RATE, momentum=0.9)
    simulator, texts = simulator_of(name, config), documents()[:batch]
    stream = simulator.stream(batch, chunk=CHUNK, context=CONTEXT)
    rows = Rows(stream, texts)
    while not rows.is_done:
        rows.step()
    adapted = stream.adapted()
    assert (len(adapted), adapted.form) == (batch, "weights")
    prompt = texts[0][None, :7]
    for row, text in enumerate(texts):
        with no_casts():
            expected = streamed(
                model_of(name), config, [text], updated_parameters(simulator), chunk=CHUNK,
                context=CONTEXT, longest=simulator.program.facts.longest,
            )  # fmt: skip
        state = adapted.state_dict(row)
        for parameter, value in expected.weights.items():
            assert error(state[parameter], value) < LIMIT, parameter
        with no_casts():
            logits = torch.func.functional_call(model_of(name), state, (prompt,)).logits
        assert error(adapted.select(row)(prompt).logits, logits) < LIMIT
    before = adapted.state_dict(0)
    stream.step(torch.ones(batch, CHUNK, dtype=torch.int64))
    assert all(torch.equal(before[key], value) for key, value in adapted.state_dict(0).items())


def test_the_unmodified_model_learns_nothing() -> None:
    simulator = simulator_of("opt", SimulatorConfig.exact(inner_lr=RATE))
    with pytest.raises(UsageError, match="learns nothing"):
        Stream(simulator, 1, StreamSettings(CHUNK, CONTEXT), learns=False).adapted()
