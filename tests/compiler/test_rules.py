"""Inner rules and their combinations, in float64, against torch.optim and the formulas of
TINT.md section 7 (tests/oracle/rules.py): logits and every weight, updates as factors and as own
weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.reference import Reference, reference
from tests.support.every import captured, model_of
from tests.support.grid import grid
from tests.support.models import tokens
from tests.support.rules import ALONE, RATE, TRAINED, rules
from tests.support.tolerances import SIMULATOR, error, measured
from tintc.compiler.casts import no_casts
from tintc.compiler.driver import lower
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.inputs import statistics_name
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.cost_model import SlotUse

MODELS = ("opt", "gpt2", "llama")
LENGTH, VOCAB = 9, 29
LIMIT = SIMULATOR[torch.float64]
# Programs: the cost model's own choice with nothing optimized, and each choice with everything.
PROGRAMS = {"plain": (False, None), "factors": (True, True), "weights": (True, False)}


def inputs_of(ends: tuple[int, ...] = (LENGTH, 6)) -> dict[str, Tensor]:
    """Sequences that train on their first so many tokens. At least four: scores of fewer positions
    have gradients that are 0 but for rounding. No token is the padding, 0.
    """
    train_mask = (torch.arange(LENGTH) < torch.tensor(ends)[:, None]).long()
    return {"input_ids": tokens(len(ends), LENGTH, VOCAB - 1) + 1, "train_mask": train_mask}


def names_of(name: str) -> list[str]:
    return [parameter for parameter, _ in model_of(name).named_parameters()]


def simulator_of(
    name: str,
    config: SimulatorConfig,
    rms: dict[str, Tensor] | None = None,
    backend: str = "fused",
) -> Simulator:
    """Not kept: there are as many configs as cases."""
    graph = captured(name, True)
    gathered = {statistics_name(parameter): value for parameter, value in (rms or {}).items()}
    return Simulator(lower(graph.copy(), config), {**graph.tensors, **gathered}, backend=backend)


@contextlib.contextmanager
def program(simulator: Simulator, kind: str) -> Iterator[None]:
    """In it, calls run that kind of program."""
    optimize, factors = PROGRAMS[kind]
    simulator.optimizations = optimize  # type: ignore[assignment]  # its setter takes more
    if factors is None:
        yield
        return
    with mock.patch.object(SlotUse, "factors_win", return_value=factors):
        yield


def expected_of(
    name: str, simulator: Simulator, rms: dict[str, Tensor] | None = None, **inputs: Tensor
) -> Reference:
    """By the oracle, which trains what the program lists."""
    with no_casts():
        trained = updated_parameters(simulator)
        return reference(model_of(name), simulator.config, **inputs, trained=trained, rms=rms)


def assert_follows(
    name: str, config: SimulatorConfig, rms: dict[str, Tensor] | None = None, **inputs: Tensor
) -> Simulator:
    """Logits and state dicts of all programs are the oracle's."""
    inputs = inputs or inputs_of()
    simulator = simulator_of(name, config, rms)
    expected = expected_of(name, simulator, rms, **inputs)
    for number, kind in enumerate(PROGRAMS):
        index = number % len(expected.states)  # each is a call, and a program, of its own
        with program(simulator, kind), torch.inference_mode():
            logits = simulator(**inputs).logits
            state = simulator.updated_state_dict(**inputs, index=index)
        off = measured(f"rules against torch.optim, {kind}", error(logits, expected.logits))
        assert off < LIMIT, f"logits, {kind}"
        assert wrong_weights(config, state, expected.states[index]) == {}, kind
    with torch.inference_mode():
        both = simulator(**inputs, return_initial=True)
    assert both.initial_logits is not None
    assert error(both.logits, expected.logits) < LIMIT
    assert error(both.initial_logits, expected.initial_logits) < LIMIT
    return simulator


def wrong_weights(
    config: SimulatorConfig, state: dict[str, Tensor], wanted: dict[str, Tensor]
) -> dict[str, float]:
    """Weights that are not the oracle's, and how far off they are."""
    assert set(state) == set(wanted)
    pairs = {name: (state[name], wanted[name]) for name in wanted}
    if config.normalize != "none" or config.optimizer != "sgd":
        pairs = {name: without_key_bias(name, *pair) for name, pair in pairs.items()}
    return {name: off for name, pair in pairs.items() if not (off := error(*pair)) < LIMIT}


def without_key_bias(name: str, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """A bias of the keys adds the same to all scores of a query: its gradient is 0 but for
    rounding, which these rules blow up.
    """
    if name.endswith("k_proj.bias"):
        return found[:0], wanted[:0]
    if name.endswith("c_attn.bias"):
        third = len(found) // 3
        keys = slice(third, 2 * third)
        found, wanted = found.clone(), wanted.clone()
        found[keys] = wanted[keys] = 0
    return found, wanted


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_without_rules(name: str) -> None:
    """What the tests below rest on: with no rule, the oracle and every program agree."""
    assert_follows(name, SimulatorConfig.exact(steps=3, inner_lr=0.01))


@grid(together=1, rule=ALONE, name=MODELS, steps=[2, 5])
def test_alone(rule: str, name: str, steps: int) -> None:
    """And it gives other logits than no rule does, else agreement would say nothing."""
    simulator = assert_follows(
        name, SimulatorConfig.exact(inner_lr=RATE, steps=steps, **ALONE[rule])
    )
    plain = SimulatorConfig.exact(inner_lr=RATE, steps=steps)
    with no_casts():
        without = reference(model_of(name), plain, **inputs_of())
    assert error(simulator(**inputs_of()).logits, without.logits) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2)
@given(data=st.data())
def test_combined(name: str, data: st.DataObject) -> None:
    assert_follows(name, data.draw(rules(names_of(name))))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150)
@given(data=st.data(), ends=st.lists(st.integers(5, LENGTH), min_size=1, max_size=3))
def test_combined_at_large(name: str, data: st.DataObject, ends: list[int]) -> None:
    assert_follows(name, data.draw(rules(names_of(name))), **inputs_of(tuple(ends)))


@pytest.mark.parametrize("schedule", [(0.5, 1.0), (1.0, 0.25), (0.5, 1.0, 0.5)])
def test_a_scaled_weight_under_a_schedule(schedule: tuple[float, ...]) -> None:
    """A step of eta itself after one of a part of it."""
    scaled = {"momentum": 0.9, "lr_scale": (("*attn*", 2.0), ("*fc2*", 0.5))}
    steps = len(schedule)
    assert_follows(
        "opt", SimulatorConfig.exact(inner_lr=RATE, steps=steps, schedule=schedule, **scaled)
    )


@pytest.mark.parametrize("name", MODELS)
def test_rms(name: str) -> None:
    """With any root mean squares; `eps` is beside them, not below the root."""
    generator = torch.Generator().manual_seed(0)
    rms = {
        parameter: torch.rand(value.shape, generator=generator, dtype=torch.float64)
        for parameter, value in model_of(name).named_parameters()
    }
    config = SimulatorConfig.exact(
        inner_lr=RATE / 4, steps=2, optimizer="rms", eps=0.1, schedule="linear", clip_norm=1.0
    )
    assert_follows(name, config, rms)


@grid(together=1, rule=["clipped momentum", "normalize", "scaled adam"], name=MODELS, steps=[2, 5])
def test_in_prefix_pages(rule: str, name: str, steps: int) -> None:
    """The transformer back end, which tests/runtime/transformer/test_inner_rules.py compares with
    the fused one.
    """
    config = SimulatorConfig.exact(inner_lr=RATE, steps=steps, **ALONE[rule])
    simulator = simulator_of(name, config, backend="transformer")
    expected = expected_of(name, simulator, **inputs_of())
    with torch.inference_mode():
        found = simulator(**inputs_of(), return_initial=True)
        state = simulator.updated_state_dict(**inputs_of())
    assert error(found.logits, expected.logits) < LIMIT
    assert error(found.initial_logits, expected.initial_logits) < LIMIT
    assert wrong_weights(config, state, expected.states[0]) == {}


@grid(together=1, name=MODELS, pattern=TRAINED, rule=["momentum", "clip", "adam", "muon"])
def test_of_some_weights(name: str, pattern: str, rule: str) -> None:
    """With `train`: that and nothing else, tied embeddings included; G holds no other weight."""
    matched = {each for each in names_of(name) if fnmatchcase(each, pattern)}
    if not matched:
        pytest.skip(f"{name} has no {pattern}")
    config = SimulatorConfig.exact(inner_lr=RATE, steps=2, train=(pattern,), **ALONE[rule])
    assert set(updated_parameters(assert_follows(name, config))) == matched


@pytest.mark.parametrize("rule", ["momentum", "normalize", "decay", "adam", "muon"])
@pytest.mark.slow
def test_a_sequence_without_targets_keeps_its_weights(rule: str) -> None:
    config = SimulatorConfig.exact(inner_lr=RATE, steps=2, **ALONE[rule])
    inputs = inputs_of((LENGTH, 1))
    simulator = assert_follows("gpt2", config, **inputs)
    state = simulator.updated_state_dict(**inputs, index=1)
    before: dict[str, Any] = model_of("gpt2").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_a_padding_row_does_not_learn() -> None:
    """`nn.Embedding(padding_idx=...)` gives that row no gradient as an input."""
    config = SimulatorConfig.exact(inner_lr=RATE, train=("model.embed_tokens.weight",))
    inputs = {**inputs_of(), "input_ids": tokens(2, LENGTH, VOCAB)}
    assert model_of("llama").get_submodule("model.embed_tokens").padding_idx == 0
    assert bool((inputs["input_ids"][0] == 0).any())
    simulator = simulator_of("llama", config)
    wanted = expected_of("llama", simulator, **inputs).states[0]
    assert wrong_weights(config, simulator.updated_state_dict(**inputs), wanted) == {}
