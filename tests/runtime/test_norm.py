"""tintc.runtime.primitives.norm against torch.autograd and the naive difference in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.runtime.shapes import Draw, batches, lengths, seeds, widths
from tests.tolerances import DIFFERENCE_FLOAT32, HALF, NAIVE_DIFFERENCE, PRIMITIVE, cosine, error
from tintc.runtime.primitives.norm import norm_backward, norm_descent, norm_forward

LIMIT = PRIMITIVE[torch.float64]
KINDS = ["layer", "rms"]
affine = st.sampled_from(["none", "shared", "own", "mixed"])
EPS = 1e-5


def f(x: Tensor, kind: str, eps: float = EPS) -> Tensor:
    """TINT.md section 2, word for word."""
    if kind == "rms":
        return x / torch.sqrt(eps + (x**2).mean(-1, keepdim=True))
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(eps + ((x - mean) ** 2).mean(-1, keepdim=True))


def gain_and_shift(draw: Draw, kind: str, b: int, d: int) -> tuple[Tensor | None, Tensor | None]:
    """Gain and shift: absent, shared, one a sequence, or a shared gain with shifts of their own (after a `bias` update)."""
    if kind == "none":
        return None, None
    return draw.parameter(b, kind != "own", d), draw.parameter(b, kind == "shared", d)


def row(parameter: Tensor | None, otherwise: float) -> Tensor | float:
    """The parameter as it multiplies (B, T, D)."""
    return otherwise if parameter is None else parameter.unsqueeze(-2)


@given(batches, lengths, widths, st.sampled_from(KINDS), affine, seeds)
def test_forward_and_exact_backward(b: int, t: int, d: int, kind: str, how: str, seed: int) -> None:
    draw = Draw(seed)
    x, (gamma, beta) = draw(b, t, d), gain_and_shift(draw, how, b, d)
    expected = f(x, kind) * row(gamma, 1.0) + row(beta, 0.0)
    assert error(norm_forward(x, gamma, beta, EPS, kind), expected) < LIMIT
    dy = draw(b, t, d)
    (dx,) = torch.autograd.grad(expected, x, dy)
    # Of one or two numbers the norm is nearly constant: its gradient is a small difference of large terms, times 1 / sqrt(eps).
    assert error(norm_backward(dy, x, gamma, EPS, kind, "exact", 1000.0), dx) < 1e2 * LIMIT


@given(batches, lengths, st.integers(2, 9), st.sampled_from(KINDS), affine, st.sampled_from([3.0, 1000.0]), seeds)
def test_first_order_is_the_difference(b: int, t: int, d: int, kind: str, how: str, scale: float, seed: int) -> None:
    draw = Draw(seed)
    x, dy, (gamma, _) = draw(b, t, d), draw(b, t, d), gain_and_shift(draw, how, b, d)
    g = dy * row(gamma, 1.0)
    naive = scale * (f(x + g / scale, kind, 0.1) - f(x, kind, 0.1))
    assert error(norm_backward(dy, x, gamma, 0.1, kind, "first_order", scale), naive) < NAIVE_DIFFERENCE


@given(batches, lengths, widths, st.sampled_from(KINDS), st.booleans(), seeds)
def test_descent(b: int, t: int, d: int, kind: str, is_shared: bool, seed: int) -> None:
    draw = Draw(seed)
    x, dy, gamma = draw(b, t, d), draw(b, t, d), draw.parameter(b, is_shared, d)
    own = gamma.detach().expand(b, d).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x, kind) * own[:, None], own, dy)
    found = norm_descent(gamma, dy, x, EPS, kind, torch.tensor(0.37, dtype=torch.float64))
    assert found.shape == (b, d)
    assert error(found, own - 0.37 * gradient) < LIMIT


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_difference_keeps_its_digits(kind: str, size: float) -> None:
    """TINT.md section 4, item 7: with |g| around 1e-3 the naive float32 difference is off by far more."""
    draw = Draw(0)
    x, gamma = draw(4, 32, 64), draw(64)
    dy = draw(4, 32, 64) * size
    g = dy * gamma
    naive = 1000 * (f(x + g / 1000, kind) - f(x, kind)) / size
    found = norm_backward(dy.float(), x.float(), gamma.float(), EPS, kind, "first_order", 1000.0) / size
    assert error(found, naive) < DIFFERENCE_FLOAT32
    if size <= 1e-3:
        x32, g32 = x.float(), g.float()
        naive32 = 1000 * (f(x32 + g32 / 1000, kind) - f(x32, kind)) / size
        assert error(naive32, naive) > 100 * DIFFERENCE_FLOAT32, "the naive form would have done"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_difference(kind: str, dtype: torch.dtype) -> None:
    draw = Draw(0)
    x, dy, gamma = (value.to(dtype) for value in (draw(2, 9, 32), draw(2, 9, 32), draw(32)))
    found = norm_backward(dy, x, gamma, EPS, kind, "first_order", 1000.0)
    expected = norm_backward(dy.double(), x.double(), gamma.double(), EPS, kind, "first_order", 1000.0)
    assert found.dtype == dtype
    assert error(found, expected) < HALF[dtype]
    assert cosine(found, expected) > UPDATE_COSINE_HALF


UPDATE_COSINE_HALF = 0.9999  # one rounding of the result, none of the difference


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays(kind: str, dtype: torch.dtype) -> None:
    draw = Draw(0)
    x, dy, gamma, beta = (value.to(dtype) for value in (draw(2, 9, 32), draw(2, 9, 32), draw(2, 32), draw(2, 32)))
    wide = [value.double() for value in (x, dy, gamma, beta)]
    forward = norm_forward(x, gamma, beta, EPS, kind)
    descent = norm_descent(gamma, dy, x, EPS, kind, torch.tensor(0.1))
    assert forward.dtype == descent.dtype == dtype
    assert error(forward, norm_forward(wide[0], wide[2], wide[3], EPS, kind)) < HALF[dtype]
    assert error(descent, norm_descent(wide[2], wide[1], wide[0], EPS, kind, torch.tensor(0.1).double())) < HALF[dtype]


@given(batches, lengths, widths, seeds, st.floats(-5, 5))
def test_layer_norm_ignores_a_shift_of_its_input(b: int, t: int, d: int, seed: int, shift: float) -> None:
    draw = Draw(seed)
    x, dy = draw(b, t, d), draw(b, t, d)
    args = (None, 0.1, "layer", "first_order", 1000.0)
    assert error(norm_backward(dy, x + shift, *args), norm_backward(dy, x, *args)) < 1e2 * LIMIT
    assert float(norm_backward(dy, x, *args).detach().sum(-1).abs().max()) < 1e-9  # no gradient along the constant direction
