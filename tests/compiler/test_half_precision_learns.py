"""Half precision keeps what it learns, however small a step is beside a weight's own digits:
against float32 and float64 on the same, rounded weights.

On a CPU all is computed in float32; `in_half` makes the programs run here that other devices run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tintc
from tests.support.grid import grid
from tests.support.models import gpt2, opt, simulate, tokens
from tests.support.tolerances import UPDATE_COSINE_HALF, cosine, error
from tintc.ir.config import SimulatorConfig
from tintc.ir.ops import onednn
from tintc.ir.ops import wide as products
from tintc.ir.ops.linear import linear_backward, linear_descent, linear_forward
from tintc.ir.ops.low_rank import low_rank
from tintc.ir.ops.wide import by_halves, wide_linear
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize import programs
from tintc.runtime.specialize.cost_model import SlotUse

HALF = (torch.bfloat16, torch.float16)
SMALL = 1e-5  # a rate whose step is below the digits of most weights
RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "three steps": {"steps": 3},
    "six steps": {"steps": 6},
    "six steps of a block": {"steps": 6, "layers": 1},  # the other one runs once
    "momentum": {"steps": 2, "momentum": 0.9, "nesterov": True},
    "decay": {"steps": 2, "decay": 0.1, "normalize": "weight"},
    "drift": {"steps": 2, "max_drift": 1e-4},
    "clipped": {"steps": 2, "clip_norm": 0.5},
    "adam": {"steps": 2, "optimizer": "adam"},
    "muon": {"steps": 2, "optimizer": "muon"},
    "everything": {"steps": 2, "train": "*"},
}


@pytest.fixture
def in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "computed_dtype", lambda stored, device: stored)


def both(dtype: torch.dtype, wide: torch.dtype, **rule: Any) -> tuple[Simulator, Simulator]:
    """(a simulator of that type, one of a wider type with the same, rounded weights)."""
    model = (gpt2 if "decay" in rule else opt)(vocab=29, hidden=32, heads=4, ffn=48, positions=32)
    config = SimulatorConfig.exact(**{"inner_lr": SMALL, **rule})
    low = simulate(model, config).to(dtype)
    return low, copy.deepcopy(low).to(wide)


def inputs() -> dict[str, Tensor]:
    ids = tokens(2, 20, 29)
    return {"input_ids": ids, "train_mask": (torch.arange(20) < torch.tensor([[9], [12]])).long()}


def changes(simulator: Simulator, **given: Tensor) -> Tensor:
    """What one sequence's training has changed, of all weights in one vector, in float64."""
    with torch.inference_mode():
        after = simulator.updated_state_dict(**given, index=1)
    before = simulator.prefix.tensors()
    names = [name for name in before if name in after]
    return torch.cat([(after[n].double() - before[n].double()).flatten() for n in names])


class TestDemo:
    """What `make demo` runs: the bundled model and its paragraph."""

    @pytest.fixture(scope="class", params=[1, 8])
    def simulator(self, request: pytest.FixtureRequest) -> Simulator:
        return tintc.compile("tiny-opt", SimulatorConfig.paper(steps=request.param), check="none")

    @pytest.mark.parametrize("dtype", HALF)
    def test_change_of_the_loss(self, simulator: Simulator, dtype: torch.dtype) -> None:
        low = copy.deepcopy(simulator).to(dtype)
        (found, adapted), (float32, _) = self.changes(low), self.changes(simulator)
        same_weights, _ = self.changes(copy.deepcopy(low).float())
        assert found > 0.02
        assert abs(found / same_weights - 1) < 1e-3
        if simulator.config.steps == 1:  # more of them tell rounded weights from others
            assert found / float32 >= 0.97
            assert adapted / float32 >= 0.97

    def changes(self, simulator: Simulator) -> tuple[float, float]:
        """(in one call, of an adapted simulator)."""
        text = (Path(__file__).parents[2] / "examples" / "paragraph.txt").read_text()
        ids = torch.tensor([simulator.tokenizer(text)["input_ids"]])
        trained, labels = ids.shape[1] // 2, ids.clone()
        mask = (torch.arange(ids.shape[1]) < trained).long()[None]
        labels[:, :trained] = -100
        with torch.inference_mode():
            outs = (
                simulator.losses(ids, mask, labels, return_initial=True),
                simulator.adapt(ids, mask).losses(ids, labels, return_initial=True),
            )
        changes = []
        for out in outs:
            assert out.initial_losses is not None
            change = (out.initial_losses.double() - out.losses.double()).sum()
            changes.append(float(change) / (ids.shape[1] - trained))
        return changes[0], changes[1]


class TestOnACpu:
    @grid(name=RULES, dtype=HALF)
    def test_updates_are_those_of_float32(self, name: str, dtype: torch.dtype) -> None:
        low, high = both(dtype, torch.float32, **RULES[name])
        updates = low.updates(**inputs())
        assert {value.dtype for value in updates.values()} == {torch.float32}
        found, expected = changes(low, **inputs()), changes(high, **inputs())
        assert float(expected.norm()) > 0
        assert float((found - expected).norm() / expected.norm()) < 2e-2  # a change of a weight
        assert cosine(found, expected) > 0.9999  # has three digits in float32

    @grid(dtype=HALF, form=["weights", "factors"])
    def test_adapted(self, dtype: torch.dtype, form: Any) -> None:
        low, high = both(dtype, torch.float32, inner_lr=0.01)
        found, expected = (each.adapt(**inputs(), form=form) for each in (low, high))
        ids = inputs()["input_ids"]
        logits, reference = found(ids).logits, expected(ids).logits
        assert logits.dtype == dtype
        assert error(logits, reference) < 2 * torch.finfo(dtype).eps
        states = found.state_dict(1), expected.state_dict(1)
        trained = [n for n, value in states[0].items() if value.dtype == torch.float32]
        assert trained
        limit = 1e-5 if form == "weights" else 1e-3  # factors are kept in the half type
        assert all(error(states[0][n], states[1][n]) < limit for n in trained)

    @grid(dtype=HALF, keys=["recompute", "cache"])
    def test_streams(self, dtype: torch.dtype, keys: Any) -> None:
        low, high = both(dtype, torch.float32, inner_lr=1e-3, steps=2)
        ids = tokens(1, 60, 29)
        found, expected = (
            each.score_first(ids, chunk=8, context=8, keys=keys).losses for each in (low, high)
        )
        finite = torch.isfinite(expected)
        limit = 1e-5 if keys == "recompute" else torch.finfo(dtype).eps * 4  # keys are kept in it
        assert error(found[finite], expected[finite]) < limit

    def test_calls_go_on_from_their_own_updates(self) -> None:
        low, high = both(torch.bfloat16, torch.float32)
        ids = inputs()["input_ids"]
        found, expected = (each.predict(each.updates(**inputs()), ids) for each in (low, high))
        assert error(found, expected) < 2 * torch.finfo(torch.bfloat16).eps

    def test_checkpoints_are_written_in_float32(self, tmp_path: Path) -> None:
        low = tintc.compile("tiny-opt", check="none").bfloat16()
        ids = tokens(1, 24, low.program.facts.vocab_size)
        adapted = low.adapt(ids, torch.ones_like(ids))
        saved = tintc.save_adapted(adapted, tmp_path / "river", "hf")
        model = AutoModelForCausalLM.from_pretrained(saved.path, dtype="auto")
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        logits = model(ids).logits
        assert error(adapted(ids).logits, logits) < 2 * torch.finfo(torch.bfloat16).eps

    def test_the_transformer_keeps_its_pages_in_half_precision(self) -> None:
        model = opt(positions=32)
        sim = simulate(model, SimulatorConfig.exact(inner_lr=SMALL), backend="transformer").half()
        found = sim.updates(**inputs())
        assert {value.dtype for value in found.values()} == {torch.float16}


class TestHalfProducts:
    @grid(name=RULES, dtype=HALF)
    def test_updates_point_as_in_float64(
        self, name: str, dtype: torch.dtype, in_half: None
    ) -> None:
        low, high = both(dtype, torch.float64, **RULES[name])
        found, expected = changes(low, **inputs()), changes(high, **inputs())
        if name == "adam":  # whose first step is the sign of each gradient
            assert cosine(found, expected) > 0.95
            return
        assert cosine(found, expected) >= UPDATE_COSINE_HALF
        assert abs(float(found.norm() / expected.norm()) - 1) < 0.03

    @grid(name=["sgd", "three steps", "drift", "everything"], dtype=HALF, factors=[True, False])
    def test_logits_under_either_form(
        self, name: str, dtype: torch.dtype, factors: bool, in_half: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(SlotUse, "factors_win", lambda *_: factors)
        rule = {**RULES[name], "inner_lr": 0.02, "max_drift": None}
        low, high = both(dtype, torch.float64, **rule)
        with torch.inference_mode():
            found, expected = (each(**inputs()).logits for each in (low, high))
        assert found.dtype == dtype
        assert error(found, expected) < (0.2 if dtype == torch.bfloat16 else 0.03)

    @grid(dtype=HALF, form=["weights", "factors"])
    def test_adapted(self, dtype: torch.dtype, form: Any, in_half: None) -> None:
        low, high = both(dtype, torch.float64, inner_lr=0.01)
        found, expected = (each.adapt(**inputs(), form=form) for each in (low, high))
        ids = inputs()["input_ids"]
        for options in ({}, {"logits_to_keep": 3}):
            logits, reference = found(ids, **options).logits, expected(ids, **options).logits
            assert error(logits, reference) < (0.1 if dtype == torch.bfloat16 else 0.02)

    @pytest.mark.parametrize("keys", ["recompute", "cache"])
    def test_streams(self, keys: Any, in_half: None) -> None:
        low, high = both(torch.float16, torch.float64, inner_lr=1e-3, steps=2)
        ids = tokens(1, 60, 29)
        found, expected = (
            each.score_first(ids, chunk=8, context=8, keys=keys).losses for each in (low, high)
        )
        finite = torch.isfinite(expected)
        assert error(found[finite], expected[finite]) < 0.02


def seen(found: Tensor, before: Tensor, change: Tensor) -> float:
    """How much of a small change is in rounded results, over all of them: 1 is all."""
    moved = found.double() - before.double()
    return float((moved * change).sum() / (change * change).sum())


class TestProducts:
    """A change far below the last digit of each result moves the mean of many."""

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("transpose", [False, True])
    def test_of_own_weights(self, dtype: torch.dtype, transpose: bool) -> None:
        torch.manual_seed(0)
        x, weight = torch.randn(2, 500, 32).to(dtype), torch.randn(64, 32).to(dtype)
        dy = torch.randn(2, 500, 64).to(dtype)
        small = 0.05 * torch.finfo(dtype).eps * torch.randn(2, 64, 32)
        own = weight.float() + small
        if transpose:
            found, before = linear_backward(dy, own), linear_backward(dy, weight.expand_as(own))
            change = dy.double() @ small.double()
        else:
            found, before = linear_forward(x, own), linear_forward(x, weight.expand_as(own))
            change = x.double() @ small.double().mT
        assert found.dtype == dtype
        assert abs(seen(found, before, change) - 1) < 0.2

    @pytest.mark.parametrize("dtype", HALF)
    def test_of_factors(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        x, weight = torch.randn(2, 500, 32).to(dtype), torch.randn(64, 32).to(dtype)
        keys, values = torch.randn(2, 9, 32).to(dtype), torch.randn(2, 9, 64).to(dtype)
        rate = torch.tensor(0.02 * torch.finfo(dtype).eps, dtype=torch.float64)
        y = wide_linear(x, weight, None, False)
        change = -rate * (x.double() @ keys.double().mT) @ values.double()
        found = low_rank(y, x, keys, values, rate, False)
        assert found.dtype == dtype
        assert abs(seen(found, linear_forward(x, weight), change) - 1) < 0.2

    @pytest.mark.parametrize("dtype", HALF)
    def test_a_gradient_below_the_smallest_half(self, dtype: torch.dtype) -> None:
        """rate dy is 1e-9, which float16 does not have."""
        torch.manual_seed(0)
        x, dy = torch.randn(1, 7, 5).to(dtype), (1e-4 * torch.randn(1, 7, 6)).to(dtype)
        rate = torch.tensor(1e-5, dtype=torch.float64)
        found = linear_descent(torch.zeros(6, 5, dtype=dtype), dy, x, rate)
        assert error(found * 1e9, -1e4 * dy.double().mT @ x.double()) < 1e-5

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("size", [1.0, 1e-12, 1e8])
    def test_by_halves(
        self, dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a GPU does, whose kernels give float32: here a product of the same factors."""
        monkeypatch.setattr(products, "_summed_wide", lambda x, y: x.float() @ y.float())
        torch.manual_seed(0)
        half, wide = torch.randn(2, 8, 32).to(dtype), size * torch.randn(2, 32, 16)
        expected = half.double() @ wide.double()
        for found, right in (
            (by_halves(half, wide, dtype), expected),
            (by_halves(wide.mT, half.mT, dtype), expected.mT),
        ):
            assert float((found - right).norm() / right.norm()) < torch.finfo(dtype).eps ** 2
        nothing = by_halves(half, torch.zeros(2, 32, 16), dtype)
        assert float(nothing.abs().max()) == 0

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize("own_bias", [False, True, None])
    def test_of_a_weight_that_is_converted_part_by_part(
        self, dtype: torch.dtype, transpose: bool, own_bias: bool | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(onednn, "_CONVERTED", 40)
        torch.manual_seed(0)
        x, addend = torch.randn(2, 7, 9), torch.randn(2, 7, 11)
        weight = torch.randn((9, 11) if transpose else (11, 9)).to(dtype)
        bias = torch.randn(2, 11) if own_bias else torch.randn(11).to(dtype)
        given = None if own_bias is None else bias
        found = onednn.onednn_product(x, weight, given, addend, transpose)
        matrix = weight.double() if transpose else weight.double().mT
        expected = x.double() @ matrix + addend.double()
        if given is not None:
            expected = expected + (given.double().unsqueeze(-2) if own_bias else given.double())
        assert found.dtype == torch.float32
        assert error(found, expected) < 1e-5
