"""The hand-written loop against an optimizer on a copy of the model; what is compared by, and how
it is timed.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle.reference import reference
from tests.support.models import gpt2, opt, simulate
from tests.support.nano import nano
from tests.support.rules import ALONE
from tintc.compiler.autograd_rule import InnerRule, rule_of
from tintc.compiler.frontend.capture import LogitsOnly
from tintc.evaluate.speed import benchmark, workload
from tintc.evaluate.speed.benchmark import (
    HandWrittenLoop,
    Turns,
    in_turn,
    relative_difference,
    variant,
)
from tintc.evaluate.speed.workload import Workload, random_workload
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.passes.specializing import OPTIMIZATION_NAMES
from tintc.runtime.machine import device_name
from tintc.runtime.simulator import Simulator

MODELS: dict[str, Any] = {"opt": opt, "gpt2": gpt2, "nano": nano}
RATE = 0.03


def case(
    name: str, config: SimulatorConfig, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Simulator, HandWrittenLoop, Workload]:
    """A model, a simulator of it, the loop that trains the same parameters of a copy, and three
    sequences.
    """
    model = MODELS[name](dtype=dtype)
    simulator = simulate(model, config)
    names = benchmark.updated_parameters(simulator)
    loop = HandWrittenLoop(copy.deepcopy(model), names, rule_of(simulator))
    work = random_workload(simulator.program.facts.vocab_size, batch=3, tokens=11, trained=7)
    return model, simulator, loop, work


def by_optimizer(
    model: nn.Module, names: list[str], ids_T: Tensor, trained: int, steps: int
) -> tuple[Tensor, nn.Module]:
    """Logits (T, V) and the model after torch.optim.SGD on the whole sequence's logits, of which
    the segment's carry loss.
    """
    changed = copy.deepcopy(model)
    optimizer = torch.optim.SGD([changed.get_parameter(name) for name in names], lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = F.cross_entropy(
            LogitsOnly(changed)(ids_T[None])[0, :-1], ids_T[1:], reduction="none"
        )
        losses[: trained - 1].sum().backward()
        optimizer.step()
    with torch.no_grad():
        return LogitsOnly(changed)(ids_T[None])[0], changed


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_equals_an_optimizer_and_the_exact_simulator(name: str, steps: int) -> None:
    model, simulator, loop, work = case(name, SimulatorConfig.exact(steps=steps, inner_lr=RATE))
    names = benchmark.updated_parameters(simulator)
    expected = [by_optimizer(model, names, ids_T, work.trained, steps)[0] for ids_T in work.ids_BT]
    initial = LogitsOnly(model)(work.ids_BT).detach()
    found = loop(work)
    assert relative_difference(found, expected) < 1e-12
    assert relative_difference(found, initial) > 1e-2  # so the step is large enough to show
    assert (
        relative_difference(workload.simulate(simulator, work), found)
        < benchmark.TOLERANCE[torch.float64]
    )
    assert relative_difference(loop(work), found) == 0.0  # the model's own weights are as they were


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "config", [SimulatorConfig.paper(inner_lr=RATE), SimulatorConfig.exact(inner_lr=RATE, layers=1)]
)
def test_trains_the_parameters_that_the_simulator_updates(
    name: str, config: SimulatorConfig
) -> None:
    model, simulator, loop, work = case(name, config)
    before, one = dict(model.state_dict()), work.few(1)
    after = simulator.updated_state_dict(one.ids_BT, one.train_mask)
    changed = {
        key for key, _ in model.named_parameters() if not torch.equal(after[key], before[key])
    }
    trained = loop.updated(one.ids_BT, one.trained)
    assert changed == {key for key, value in trained.items() if not torch.equal(value, before[key])}
    assert 0 < len(trained) < len(list(model.parameters()))
    if config.is_exact:
        assert all(
            torch.allclose(value, after[key], rtol=0, atol=1e-12) for key, value in trained.items()
        )


@pytest.mark.parametrize("rule", ["clipped momentum", "scaled adam", "muon with momentum"])
def test_follows_a_rule(rule: str) -> None:
    """The names that the loop gives to weights are those that patterns are written for."""
    fields = {"lr_scale": {"*.bias": 0.5, "*.mlp.*": 2.0}, **ALONE[rule]}
    config = SimulatorConfig.exact(steps=3, inner_lr=0.002, **fields)
    model, simulator, loop, work = case("gpt2", config)
    names = benchmark.updated_parameters(simulator)
    masks = {"input_ids": work.ids_BT, "train_mask": work.train_mask}
    expected = reference(model, config, **masks, trained=names)
    assert relative_difference(loop(work), expected.logits) < 1e-12
    initial = LogitsOnly(model)(work.ids_BT).detach()
    assert relative_difference(loop(work), initial) > 1e-3


def test_only_those_ask_for_gradients_and_none_stays() -> None:
    model = opt()
    simulator = simulate(model, SimulatorConfig.exact(layers=1))
    names = benchmark.updated_parameters(simulator)
    assert all(".layers.1." in name or "final_layer_norm" in name for name in names)
    config = SimulatorConfig.exact(steps=2, inner_lr=RATE)
    loop = HandWrittenLoop(model, names, InnerRule(config))
    out = loop(random_workload(29, batch=2, tokens=9, trained=5))
    assert [tuple(logits.shape) for logits in out] == [(9, 29), (9, 29)]
    assert not any(logits.requires_grad for logits in out)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(
        names
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sees_the_training_segment_alone() -> None:
    *_, loop, work = case("opt", SimulatorConfig.exact(inner_lr=RATE))
    other = work.ids_BT.clone()
    other[:, work.trained :] = (other[:, work.trained :] + 1) % 29
    for a, b in zip(
        loop.updated(work.ids_BT[:1], 7).values(), loop.updated(other[:1], 7).values(), strict=True
    ):
        assert torch.equal(a, b)
    other[:, work.trained - 1] = (other[:, work.trained - 1] + 1) % 29  # the last target
    assert (
        relative_difference(
            loop.updated(work.ids_BT[:1], 7).values(), loop.updated(other[:1], 7).values()
        )
        > 1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_predicts_the_rest_alone(name: str) -> None:
    """nano's head cannot leave out positions; that of transformers' models can."""
    *_, simulator, loop, work = case(name, SimulatorConfig.exact(inner_lr=RATE))
    rest, whole = replace(work, predict="rest"), loop(work)
    expected = [logits[work.trained - 1 :] for logits in whole]
    assert [tuple(logits.shape) for logits in expected] == [(5, whole[0].shape[1])] * 3
    assert relative_difference(loop(rest), expected) < 1e-12
    assert relative_difference(workload.simulate(simulator, rest), expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    _, simulator, loop, work = case("gpt2", SimulatorConfig.exact(steps=2, inner_lr=0.01), dtype)
    found = loop(work)
    assert found[0].dtype == dtype
    assert (
        relative_difference(workload.simulate(simulator, work), found) < benchmark.TOLERANCE[dtype]
    )


def test_tolerances_are_for_every_dtype() -> None:
    from tintc.compiler.frontend.sources import DTYPES

    assert set(benchmark.TOLERANCE) == set(DTYPES)


class TestComparison:
    def test_relative_difference(self) -> None:
        assert (
            relative_difference(
                [torch.tensor([1.0, 4.0]), torch.tensor([0.0])],
                [torch.tensor([2.0, 4.0]), torch.tensor([-2.0])],
            )
            == 0.5
        )
        found = relative_difference(
            [torch.tensor([1.0, float("nan")]), torch.tensor([0.0])], [torch.ones(2), torch.ones(1)]
        )
        assert found != found
        with pytest.raises(ValueError, match="shorter"):
            relative_difference([torch.ones(1)], [])

    def test_workload(self) -> None:
        small, large = (
            random_workload(29, batch=1, tokens=5, trained=2, seed=3),
            random_workload(29, batch=4, tokens=5, trained=2, seed=3),
        )
        assert torch.equal(small.ids_BT, large.few(1).ids_BT)
        assert not torch.equal(
            small.ids_BT, random_workload(29, batch=1, tokens=5, trained=2, seed=4).ids_BT
        )
        assert small.train_mask.tolist() == [[1, 1, 0, 0, 0]]

    def test_variant(self) -> None:
        simulator = simulate(opt(), SimulatorConfig.exact(inner_lr=RATE))
        plain = variant(simulator, ())
        assert (simulator.optimizations, plain.optimizations) == (OPTIMIZATION_NAMES, ())
        assert all(a is b for a, b in zip(simulator.parameters(), plain.parameters(), strict=True))
        work = random_workload(29, batch=2, tokens=11, trained=7)
        assert (
            relative_difference(workload.simulate(simulator, work), workload.simulate(plain, work))
            < 1e-9
        )
        with pytest.raises(UsageError):
            variant(simulator, ["speed"])


class TestClock:
    def test_runs_in_turn_after_one_call_that_does_not_count(self) -> None:
        calls: list[str] = []
        pairs: list[int] = []
        turns = in_turn(
            lambda: calls.append("a"),
            lambda: calls.append("b"),
            pairs=3,
            device="cpu",
            on_pair=pairs.append,
        )
        assert "".join(calls) == "abababab"
        assert pairs == [0, 1, 2]
        assert (len(turns.base), len(turns.other)) == (3, 3)
        assert all(seconds >= 0 for seconds in turns.base + turns.other)

    def test_ratio_is_the_median_of_the_pairs_own(self) -> None:
        assert Turns([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]).to_dict("a", "b") == {
            "a_seconds": 2.0,
            "b_seconds": 2.0,
            "ratio": 1.0,
            "ratio_range": [0.5, 2.0],
            "ratios": [2.0, 1.0, 0.5],
            "a_times": [1.0, 2.0, 4.0],
            "b_times": [2.0, 2.0, 2.0],
        }

    def test_matmul_rates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(benchmark.MATMUL_SIZE, "cpu", 32)
        assert benchmark.matmul_size("cpu") == 32
        for dtype in benchmark.TOLERANCE:
            rates = benchmark.matmul_rates(dtype, "cpu")
            assert rates.keys() - {"oneDNN"} == {"torch.mm"}
            assert all(rate > 0 for rate in rates.values())
        name = device_name("cpu")
        assert name.endswith(f", {torch.backends.cpu.get_cpu_capability()}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda() -> None:
    _, simulator, _, work = case("gpt2", SimulatorConfig.exact(steps=2, inner_lr=RATE))
    names = benchmark.updated_parameters(simulator)
    loop = HandWrittenLoop(gpt2().to("cuda"), names, rule_of(simulator))
    work = work.to("cuda")
    simulator = simulator.to("cuda")
    assert (
        relative_difference(workload.simulate(simulator, work), loop(work))
        < benchmark.TOLERANCE[torch.float64]
    )
    turns = in_turn(
        lambda: loop(work), lambda: workload.simulate(simulator, work), pairs=2, device="cuda"
    )
    assert min(turns.base + turns.other) > 0
    assert benchmark.matmul_rates(torch.bfloat16, "cuda")["torch.mm"] > 0
    assert device_name("cuda")
