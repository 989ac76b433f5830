"""tintc.ir.ops.loss against torch.autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, batches, lengths, seeds, widths
from tests.support.tolerances import HALF, PRIMITIVE, error
from tintc.ir.ops.loss import loss_gradient, mean_embedding_gradient

LIMIT = PRIMITIVE[torch.float64]


def problem(b: int, t: int, v: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Draw]:
    """Logits, targets and a loss mask with holes."""
    draw = Draw(seed)
    targets = torch.randint(v, (b, t), generator=draw.generator)
    mask = (torch.rand(b, t, generator=draw.generator) < 0.6).double()
    return draw(b, t, v, scale=3.0), targets, mask, draw


@given(batches, lengths, st.integers(1, 11), seeds)
def test_softmax_is_the_gradient_of_the_summed_loss(b: int, t: int, v: int, seed: int) -> None:
    z, targets, mask, _ = problem(b, t, v, seed)
    z = z.detach().requires_grad_()
    total = (
        F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none") * mask.flatten()
    ).sum()
    (expected,) = torch.autograd.grad(total, z)
    found = loss_gradient(z, targets, mask, "softmax")
    assert error(found, expected) < LIMIT
    assert (
        float(found.detach().sum(-1).abs().max()) < LIMIT
    )  # probabilities and the target both sum to one


@given(batches, lengths, st.integers(1, 11), seeds)
def test_quadratic(b: int, t: int, v: int, seed: int) -> None:
    z, targets, mask, _ = problem(b, t, v, seed)
    expected = (z - F.one_hot(targets, v)) * mask[..., None]
    assert error(loss_gradient(z, targets, mask, "quadratic"), expected) < LIMIT


@given(batches, lengths, st.integers(1, 11), widths, seeds)
def test_mean_embedding(b: int, t: int, v: int, d: int, seed: int) -> None:
    """E^T (1/V - 1_y), without logits."""
    _, targets, mask, draw = problem(b, t, v, seed)
    table = draw(v, d)
    dz = (1 / v - F.one_hot(targets, v).double()) * mask[..., None]
    expected = dz @ table
    assert error(loss_gradient(draw(b, t, v), targets, mask, "mean_embedding"), dz) < LIMIT
    assert error(mean_embedding_gradient(table, targets, mask), expected) < LIMIT


@pytest.mark.parametrize("kind", ["softmax", "quadratic"])
def test_masked_positions_carry_nothing(kind: str) -> None:
    z, targets, _, _ = problem(2, 5, 7, 0)
    found = loss_gradient(z, targets, torch.zeros(2, 5, dtype=torch.float64), kind)
    assert torch.equal(found, torch.zeros_like(found))


def test_logits_are_not_changed_in_place() -> None:
    z, targets, mask, _ = problem(2, 5, 7, 0)
    before = z.detach().clone()
    loss_gradient(z, targets, mask, "quadratic")
    assert torch.equal(z, before)


def test_large_logits_stay_finite() -> None:
    z = torch.tensor([[[3000.0, -3000.0, 0.0]]], dtype=torch.float64)
    found = loss_gradient(z, torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.float64), "softmax")
    assert torch.equal(found, torch.tensor([[[1.0, -1.0, 0.0]]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays(dtype: torch.dtype) -> None:
    z, targets, mask, draw = problem(2, 9, 33, 0)
    low = z.to(dtype)
    table = draw(33, 8).to(dtype)
    for kind in ("softmax", "quadratic"):
        found = loss_gradient(low, targets, mask.to(dtype), kind)
        assert found.dtype == dtype
        assert error(found, loss_gradient(low.double(), targets, mask, kind)) < HALF[dtype]
    found = mean_embedding_gradient(table, targets, mask.to(dtype))
    assert found.dtype == dtype
    assert error(found, mean_embedding_gradient(table.double(), targets, mask)) < HALF[dtype]
