"""tintc.ir.ops.activation against torch.autograd and the naive difference in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, seeds
from tests.support.tolerances import DIFFERENCE_FLOAT32, HALF, NAIVE_DIFFERENCE, PRIMITIVE, error
from tintc.ir.ops.activation import KINDS, activation_backward, activation_forward

TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "clamp": lambda x: x.clamp(min=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "relu_squared": lambda x: F.relu(x) ** 2,
}
kinds = st.sampled_from(sorted(TORCH))
LIMIT = PRIMITIVE[torch.float64]


def test_every_kind_is_tested() -> None:
    assert set(KINDS) == set(TORCH)


@given(
    kinds,
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seeds,
    st.sampled_from([0.1, 1.0, 6.0]),
)
def test_forward_and_exact_backward(kind: str, shape: list[int], seed: int, spread: float) -> None:
    draw = Draw(seed)
    x, dy = draw(*shape, scale=spread).detach().requires_grad_(), draw(*shape)
    expected = TORCH[kind](x)
    (dx,) = torch.autograd.grad(expected, x, dy)
    assert error(activation_forward(x, kind), expected) < LIMIT
    assert error(activation_backward(dy, x, kind, "exact", 1000.0), dx) < LIMIT


@given(
    kinds,
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seeds,
    st.sampled_from([0.5, 10.0, 1000.0]),
)
def test_first_order_is_the_difference(
    kind: str, shape: list[int], seed: int, scale: float
) -> None:
    """With a small scale most ReLUs change sign between x and x + dy/N."""
    draw, a = Draw(seed), TORCH[kind]
    x, dy = draw(*shape), draw(*shape)
    naive = scale * (a(x + dy / scale) - a(x))
    assert error(activation_backward(dy, x, kind, "first_order", scale), naive) < NAIVE_DIFFERENCE


@pytest.mark.parametrize("kind", ["relu", "clamp", "maximum", "relu_squared"])
def test_at_zero(kind: str) -> None:
    """Each spelling of max(x, 0) has the derivative at its kink that torch gives it."""
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    dy = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64)
    (dx,) = torch.autograd.grad(TORCH[kind](x), x, dy)
    assert torch.equal(activation_backward(dy, x.detach(), kind, "exact", 1000.0), dx)


@pytest.mark.parametrize("kind", ["relu", "clamp", "maximum"])
def test_difference_at_zero(kind: str) -> None:
    x, dy = torch.zeros(3, dtype=torch.float64), torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64)
    assert torch.equal(
        activation_backward(dy, x, kind, "first_order", 1000.0),
        torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64),
    )


@pytest.mark.parametrize("kind", ["relu", "relu_squared"])
def test_float32_difference_across_the_kink(kind: str) -> None:
    """x and x + dy/N on both sides of 0, where derivatives say nothing."""
    a = TORCH[kind]
    x, dy = (
        torch.tensor([-1e-4, 1e-4, -3e-4, 2e-4, -1e-3]).double(),
        torch.tensor([1.0, -1.0, 0.5, -0.1, 0.5]).double(),
    )
    x, dy = x.float().double(), dy.float().double()
    naive = 1000 * (a(x + dy / 1000) - a(x))
    found = activation_backward(dy.float(), x.float(), kind, "first_order", 1000.0)
    assert (
        float(((found.double() - naive).abs() / naive.abs().clamp(min=1e-12)).max())
        < DIFFERENCE_FLOAT32
    )


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("kind", sorted(TORCH))
def test_float32_difference_keeps_its_digits(kind: str, size: float) -> None:
    draw, a = Draw(1), TORCH[kind]
    x, dy = draw(4000), draw(4000) * size
    x = x.float().double()  # the same points in both precisions
    dy = dy.float().double()
    naive = 1000 * (a(x + dy / 1000) - a(x)) / size
    found = activation_backward(dy.float(), x.float(), kind, "first_order", 1000.0) / size
    # Cancellation in the float64 difference itself costs about 1000 * 1e-16 / size.
    assert error(found, naive) < DIFFERENCE_FLOAT32
    if size <= 1e-3:
        x32, dy32 = x.float(), dy.float()
        naive32 = 1000 * (a(x32 + dy32 / 1000) - a(x32)) / size
        assert error(naive32, naive) > 100 * DIFFERENCE_FLOAT32, "the naive form would have done"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gradient", ["first_order", "exact"])
@pytest.mark.parametrize("kind", sorted(TORCH))
def test_half_precision_stays(kind: str, gradient: str, dtype: torch.dtype) -> None:
    draw = Draw(2)
    x, dy = draw(500).to(dtype), draw(500).to(dtype)
    forward, backward = (
        activation_forward(x, kind),
        activation_backward(dy, x, kind, gradient, 1000.0),
    )
    assert forward.dtype == backward.dtype == dtype
    assert error(forward, TORCH[kind](x.double())) < HALF[dtype]
    assert (
        error(backward, activation_backward(dy.double(), x.double(), kind, gradient, 1000.0))
        < HALF[dtype]
    )
