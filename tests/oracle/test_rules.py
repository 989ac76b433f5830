"""The oracle's rules against torch.optim on a small problem, and against sums done by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.oracle.rules import Rule, chunk_gradients, muon_direction, root_mean_squares
from tests.support.families import FAMILIES, VOCAB
from tests.support.models import opt, tokens
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig

EQUAL = 1e-12
# torch.optim.Muon rounds to bfloat16; gradients here have full rank.
MUON = 0.05


class Problem(nn.Module):
    """Two linear layers, a norm, and a Conv1D whose weight is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, 9), nn.Linear(9, 4, bias=False)
        self.norm, self.conv = nn.LayerNorm(4), Conv1D(7, 4)
        nn.init.normal_(self.conv.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(self.second(torch.tanh(self.first(x)))))
        return y


X = torch.randn(11, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def loss(y: Tensor) -> Tensor:
    return (y**2).sum() / 2 + y.sin().sum()


def by_rule(config: SimulatorConfig, steps: int | None = None) -> dict[str, Tensor]:
    model = Problem()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    rule = Rule(model, weights, config)
    for _ in range(config.steps if steps is None else steps):
        leaves = {name: value.requires_grad_() for name, value in weights.items()}
        found = torch.autograd.grad(
            loss(torch.func.functional_call(model, leaves, (X,))), list(leaves.values())
        )
        stepped = rule.step(dict(zip(leaves, found, strict=True)))
        weights = {name: value.detach() for name, value in (weights | stepped).items()}
    return weights


def by_optimizer(
    make: Callable[[Problem], torch.optim.Optimizer],
    steps: int,
    factor: Callable[[int], float] = lambda k: 1.0,
    clip: float | None = None,
) -> dict[str, Tensor]:
    model = Problem()
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(X)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert set(found) == set(expected)
    return max(error(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    ids=["plain", "momentum", "nesterov"],
)
def test_sgd(options: dict[str, Any]) -> None:
    found = by_rule(SimulatorConfig.exact(steps=4, inner_lr=0.01, **options))
    expected = by_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=0.01, **options), 4)
    assert worst(found, expected) < EQUAL


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_schedule_and_groups(optimizer: str) -> None:
    config = SimulatorConfig.exact(
        steps=4,
        inner_lr=0.02,
        optimizer=optimizer,
        schedule="cosine",
        lr_scale={"*": 0.5, "conv.*": 2.0, "norm.weight": 0.0},
    )
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

    def make(model: Problem) -> torch.optim.Optimizer:
        rest = [p for n, p in model.named_parameters() if not n.startswith(("conv", "norm.weight"))]
        groups = [
            {"params": rest, "lr": 0.01},
            {"params": model.conv.parameters(), "lr": 0.04},
            {"params": [model.norm.weight], "lr": 0.0},
        ]
        return kinds[optimizer](groups)

    expected = by_optimizer(make, 4, lambda k: (1 + math.cos(math.pi * k / 4)) / 2)
    assert worst(by_rule(config), expected) < EQUAL


def test_adam_has_its_betas_and_eps() -> None:
    config = SimulatorConfig.exact(
        steps=3, inner_lr=0.03, optimizer="adam", betas=(0.7, 0.9), eps=1e-3, clip_norm=0.5
    )
    expected = by_optimizer(
        lambda m: torch.optim.Adam(m.parameters(), lr=0.03, betas=(0.7, 0.9), eps=1e-3), 3, clip=0.5
    )
    assert worst(by_rule(config), expected) < EQUAL


def test_a_negative_rate_ascends() -> None:
    up = by_rule(SimulatorConfig.exact(inner_lr=-0.01))
    down = by_rule(SimulatorConfig.exact(inner_lr=0.01))
    before = dict(Problem().named_parameters())
    for name, value in up.items():
        assert error(value - before[name], before[name] - down[name]) < EQUAL


def test_a_list_is_the_schedule() -> None:
    as_list = by_rule(SimulatorConfig.exact(steps=4, inner_lr=0.02, schedule=(1, 0.75, 0.5, 0.25)))
    assert (
        worst(by_rule(SimulatorConfig.exact(steps=4, inner_lr=0.02, schedule="linear")), as_list)
        < EQUAL
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torch_optim_muon(nesterov: bool) -> None:
    """On gradients of full rank, one step after the other from the same weights and gradients."""
    torch.manual_seed(0)
    shapes = {"first.weight": (9, 5), "second.weight": (4, 9), "conv.weight": (4, 7)}
    model, steps = Problem(), 3
    weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    config = SimulatorConfig.exact(
        steps=steps, inner_lr=0.1, optimizer="muon", momentum=0.8, nesterov=nesterov
    )
    rule = Rule(model, weights, config)
    turned = {"conv.weight"}
    theirs = {
        name: nn.Parameter((value.T if name in turned else value).clone())
        for name, value in weights.items()
    }
    optimizer = torch.optim.Muon(
        theirs.values(), lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.0
    )
    found = weights
    for _ in range(steps):
        gradients = {name: torch.randn_like(value) for name, value in weights.items()}
        found = rule.step(dict(gradients))
        for name, parameter in theirs.items():
            parameter.grad = (gradients[name].T if name in turned else gradients[name]).clone()
        optimizer.step()
    for name, value in found.items():
        expected = theirs[name].detach()
        update = (expected.T if name in turned else expected) - weights[name]
        assert float((value - weights[name] - update).norm() / update.norm()) < MUON


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_direction_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scaled = muon_direction(g) / math.sqrt(max(1.0, shape[0] / shape[1]))
    singular = torch.linalg.svdvals(scaled)
    assert float(singular.min()) > 0.3 and float(singular.max()) < 1.3
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    shared = left.T @ scaled @ right.T  # the same singular vectors as g
    assert float((shared - shared.diagonal().diag()).abs().max()) < 1e-10


def test_muon_leaves_the_rest_to_sgd() -> None:
    muon = by_rule(SimulatorConfig.exact(inner_lr=0.01, optimizer="muon"))
    sgd = by_rule(SimulatorConfig.exact(inner_lr=0.01))
    differing = {name for name in sgd if error(muon[name], sgd[name]) > 1e-6}
    assert differing == {"first.weight", "second.weight", "conv.weight"}


def test_a_head_is_no_matrix_of_muon() -> None:
    model = opt(tie_word_embeddings=False)
    names = ("lm_head.weight", "model.decoder.layers.0.fc1.weight")
    weights = {name: model.get_parameter(name).detach() for name in names}
    config = SimulatorConfig.exact(inner_lr=0.1, optimizer="muon")
    gradients = {name: torch.randn_like(value) for name, value in weights.items()}
    found = Rule(model, weights, config).step(dict(gradients))
    head, inside = ((weights[name] - found[name]) / 0.1 for name in names)
    assert error(head, gradients[names[0]]) < EQUAL
    assert error(inside, muon_direction(gradients[names[1]])) < EQUAL


def one_weight(gradients: list[list[float]], **fields: Any) -> list[float]:
    """A weight (3, 4) after steps with those gradients, written (2,) here."""
    model = Problem()
    weight = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    rule = Rule(model, {"norm.bias": weight}, SimulatorConfig.exact(steps=len(gradients), **fields))
    found = weight
    for g in gradients:
        padded = torch.tensor([*g, 0.0, 0.0], dtype=torch.float64)
        found = rule.step({"norm.bias": padded})["norm.bias"]
    return [round(value, 8) for value in found[:2].tolist()]


def test_by_hand() -> None:
    assert one_weight([[1, 2]], inner_lr=0.5) == [2.5, 3.0]
    assert one_weight([[1, 2]], inner_lr=0.5, decay=0.5) == [2.75, 3.5]
    assert one_weight([[1, 2], [1, 2]], inner_lr=0.5, decay=0.5) == [2.625, 3.25]
    # W_0 has norm 5; a drift of (3, 4) has too, and may have half of it
    assert one_weight([[-3, -4]], inner_lr=1.0, max_drift=0.5) == [4.5, 6.0]
    assert one_weight([[-3, -4]], inner_lr=1.0, max_drift=2.0) == [6.0, 8.0]
    assert one_weight([[3, 4]], inner_lr=1.0, clip_norm=1.0) == [
        round(3 - 3 / 5.000001, 8),
        round(4 - 4 / 5.000001, 8),
    ]
    # a root mean square over four numbers, two of them 0: 5 / 2
    assert one_weight([[3, 4]], inner_lr=1.0, normalize="weight") == [1.8, 2.4]
    # decay, then the drift's limit: (3, 4) is halved and fits
    assert one_weight([[-3, -4]], inner_lr=1.0, decay=0.5, max_drift=0.5) == [4.5, 6.0]


def test_a_weight_of_zeros_may_drift() -> None:
    model = Problem()
    zero = torch.zeros(4, dtype=torch.float64)
    rule = Rule(model, {"norm.bias": zero}, SimulatorConfig.exact(inner_lr=1.0, max_drift=0.1))
    assert rule.step({"norm.bias": torch.ones_like(zero)})["norm.bias"].tolist() == [-1.0] * 4


def test_rms_divides_by_what_was_gathered() -> None:
    model = FAMILIES["llama"].build()
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    ids = tokens(1, 15, VOCAB)[0]
    chunks = list(chunk_gradients(model, names, ids, targets=4, context=6))
    assert len(chunks) == 4
    rms = root_mean_squares(chunks)
    by_hand = sum(chunk[names[0]] ** 2 for chunk in chunks) / 4
    assert error(rms[names[0]] ** 2, torch.as_tensor(by_hand)) < EQUAL
    weights = {name: model.get_parameter(name).detach() for name in names}
    rule = Rule(model, weights, SimulatorConfig.exact(inner_lr=1.0, optimizer="rms", eps=0.5), rms)
    found = rule.step(dict(chunks[0]))
    for name in names:
        expected = weights[name] - chunks[0][name] / (rms[name] + 0.5)
        assert error(found[name], expected) < EQUAL
