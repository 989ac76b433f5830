"""The rule of the loops by autograd, against torch.optim and the formulas of tests/oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.oracle.rules import Rule, muon_direction
from tests.support.models import gpt2, opt, simulate
from tests.support.rules import ALONE, rules
from tests.support.tolerances import error
from tintc.compiler.autograd_rule import InnerRule, matrices, orthogonal, summed_loss
from tintc.ir.config import SimulatorConfig

LIMIT = 1e-11


class Small(nn.Module):
    """Named so that the patterns of tests/support/rules.py match some of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.h = nn.LayerNorm(3), nn.ModuleDict()
        self.h["0"], self.h["1"] = nn.Linear(3, 6), Conv1D(5, 6)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.h["1"](torch.tanh(self.h["0"](self.norm(x))))
        return found


MATRICES = {"h.0.weight": False, "h.1.weight": True}


def weights() -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in Small().named_parameters()}


def loss(of: dict[str, Tensor]) -> Tensor:
    x = torch.arange(12, dtype=torch.float64).view(4, 3).sin()
    return summed_loss(torch.func.functional_call(Small(), of, (x,)), torch.tensor([0, 4, 1, 1]))


def by_oracle(config: SimulatorConfig, rms: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    now = weights()
    rule = Rule(Small(), now, config, rms)
    for _ in range(config.steps):
        found = torch.autograd.grad(loss(now), list(now.values()))
        now = now | rule.step(dict(zip(now, found, strict=True)))
        now = {name: value.detach().requires_grad_() for name, value in now.items()}
    return now


def assert_follows(config: SimulatorConfig, rms: dict[str, Tensor] | None = None) -> None:
    """A first step to new weights, then steps in place; and in place from the start."""
    rule, before, expected = InnerRule(config, MATRICES, rms=rms), weights(), by_oracle(config, rms)
    state = rule.start(before)
    first = rule.step(loss(before), before, state)
    assert all(torch.equal(before[name], value) for name, value in weights().items())
    own, other = weights(), rule.start(before)
    rule.step_in_place(loss(own), own, other)
    for _ in range(config.steps - 1):
        rule.step_in_place(loss(first), first, state)
        rule.step_in_place(loss(own), own, other)
    for name, value in expected.items():
        assert error(first[name], value) < LIMIT, name
        assert torch.equal(first[name], own[name])
        assert first[name].requires_grad and first[name].is_leaf and first[name].grad is None


@pytest.mark.parametrize("rule", ALONE)
def test_each_rule(rule: str) -> None:
    assert_follows(SimulatorConfig.exact(inner_lr=0.05, steps=3, **ALONE[rule]))


@settings(max_examples=60)
@given(config=rules([name for name, _ in Small().named_parameters()]))
@pytest.mark.slow
def test_combined(config: SimulatorConfig) -> None:
    assert_follows(config)


def test_rms() -> None:
    rms = {name: torch.rand_like(value) for name, value in weights().items()}
    config = SimulatorConfig.exact(inner_lr=0.01, steps=2, optimizer="rms", eps=1e-3)
    assert_follows(config, {name: value.detach() for name, value in rms.items()})


@pytest.mark.parametrize("rate", [0.3, -0.3])
def test_equals_torch_s_optimizer(rate: float) -> None:
    expected = weights()
    optimizer = torch.optim.SGD(expected.values(), lr=abs(rate), maximize=rate < 0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(expected).backward()
        optimizer.step()
    rule, found = InnerRule(SimulatorConfig.exact(inner_lr=rate)), weights()
    state = rule.start(found)
    for _ in range(3):
        found = rule.step(loss(found), found, state)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-13)


def test_gradients_that_share_memory() -> None:
    """Autograd gives b and c one tensor: what is done to it for one must not reach the other."""
    config = SimulatorConfig.exact(inner_lr=0.1, clip_norm=0.5, momentum=0.9)
    rule = InnerRule(config)
    given = {name: torch.ones(4, dtype=torch.float64).requires_grad_() for name in ("b", "c")}
    state = rule.start(given)
    for _ in range(2):
        given = rule.step(((given["b"] + given["c"]) ** 2).sum(), given, state)
    assert torch.equal(given["b"], given["c"])
    assert not torch.equal(state.first["b"], torch.zeros(4, dtype=torch.float64))
    assert state.first["b"].data_ptr() != state.first["c"].data_ptr()


def test_a_weight_of_zeros_may_drift() -> None:
    rule = InnerRule(SimulatorConfig.exact(inner_lr=1.0, max_drift=0.1))
    given = {"b": torch.zeros(3, dtype=torch.float64).requires_grad_()}
    state = rule.start(given)
    found = rule.step((given["b"] * 0).sum(), given, state)
    assert found["b"].tolist() == [0.0] * 3
    assert rule.step(found["b"].sum(), found, state)["b"].tolist() == [-1.0] * 3


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orthogonal(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    limit = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype]
    assert orthogonal(g.to(dtype)).dtype == dtype
    assert error(orthogonal(g.to(dtype)), muon_direction(g)) < limit


def test_matrices_are_those_of_linear_layers() -> None:
    found = matrices(simulate(opt(tie_word_embeddings=False), SimulatorConfig.exact(layers=1)))
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    inside = {f"{n}.weight": False for n in (*names, "fc1", "fc2")}
    expected: dict[str, Any] = {
        f"model.decoder.layers.{i}.{name}": turned
        for i in range(2)
        for name, turned in inside.items()
    }
    assert found == expected
    conv = matrices(simulate(gpt2(), SimulatorConfig.exact()))
    assert set(conv.values()) == {True} and "transformer.h.1.attn.c_attn.weight" in conv


def test_the_loss_is_a_sum_in_float32_at_least() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.tensor([1, 0, 5, 2])
    log_p = logits.double().log_softmax(-1)
    expected = -sum(log_p[t, int(target)] for t, target in enumerate(targets))
    found = summed_loss(logits, targets)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(
        found, F.cross_entropy(logits.float(), targets, reduction="sum"), rtol=0, atol=0
    )
