"""tintc.ir.ops.norm against torch.autograd and the naive difference in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, batches, lengths, seeds, widths
from tests.support.tolerances import (
    DIFFERENCE_FLOAT32,
    HALF,
    NAIVE_DIFFERENCE,
    PRIMITIVE,
    cosine,
    error,
)
from tintc.ir.ops import norm
from tintc.ir.ops.norm import norm_backward, norm_descent, norm_forward

LIMIT = PRIMITIVE[torch.float64]
KINDS = ["layer", "rms"]
kinds = st.sampled_from(KINDS)
affine = st.sampled_from(["none", "shared", "own", "mixed"])
heads = st.integers(1, 3)
offsets = st.sampled_from([0.0, 1.0])
ONE = (1, 0.0)  # one piece, nothing added to the gain
EPS = 1e-5


def test_every_kind_is_tested() -> None:
    assert set(norm.KINDS) == {*KINDS, "scale"}


def f(x: Tensor, kind: str, eps: float = EPS) -> Tensor:
    """TINT.md section 2, word for word."""
    if kind == "scale":
        return x
    if kind == "rms":
        return x / torch.sqrt(eps + (x**2).mean(-1, keepdim=True))
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(eps + ((x - mean) ** 2).mean(-1, keepdim=True))


def by_pieces(x: Tensor, h: int, kind: str, eps: float = EPS) -> Tensor:
    """f of each of h pieces by itself."""
    return torch.cat([f(piece, kind, eps) for piece in x.chunk(h, -1)], -1)


def gain_and_shift(draw: Draw, kind: str, b: int, d: int) -> tuple[Tensor | None, Tensor | None]:
    """Gain and shift: absent, shared, one a sequence, or a shared gain with shifts of their own
    (after a `bias` update).
    """
    if kind == "none":
        return None, None
    return draw.parameter(b, kind != "own", d), draw.parameter(b, kind == "shared", d)


def row(parameter: Tensor | None, otherwise: float, h: int = 1) -> Tensor | float:
    """The parameter as it multiplies (B, T, H D): once for each piece."""
    return otherwise if parameter is None else torch.cat([parameter.unsqueeze(-2)] * h, -1)


def gain(gamma: Tensor | None, h: int, offset: float) -> Tensor | float:
    """gamma + offset; without a gamma nothing multiplies."""
    return row(None if gamma is None else gamma + offset, 1.0, h)


@given(batches, lengths, widths, heads, kinds, affine, offsets, seeds)
def test_forward_and_exact_backward(
    b: int, t: int, d: int, h: int, kind: str, how: str, offset: float, seed: int
) -> None:
    draw = Draw(seed)
    x, (gamma, beta) = draw(b, t, h * d), gain_and_shift(draw, how, b, d)
    expected = by_pieces(x, h, kind) * gain(gamma, h, offset) + row(beta, 0.0, h)
    assert error(norm_forward(x, gamma, beta, EPS, kind, h, offset), expected) < LIMIT
    dy = draw(b, t, h * d)
    (dx,) = torch.autograd.grad(expected, x, dy)
    # Of one or two numbers the norm is nearly constant: its gradient is a small difference of large
    # terms, times 1 / sqrt(eps).
    assert (
        error(norm_backward(dy, x, gamma, EPS, kind, h, offset, "exact", 1000.0), dx) < 1e2 * LIMIT
    )


@given(
    batches,
    lengths,
    st.integers(2, 9),
    heads,
    kinds,
    affine,
    offsets,
    st.sampled_from([3.0, 1000.0]),
    seeds,
)
def test_first_order_is_the_difference(
    b: int, t: int, d: int, h: int, kind: str, how: str, offset: float, scale: float, seed: int
) -> None:
    draw = Draw(seed)
    x, dy, (gamma, _) = draw(b, t, h * d), draw(b, t, h * d), gain_and_shift(draw, how, b, d)
    g = dy * gain(gamma, h, offset)
    naive = scale * (by_pieces(x + g / scale, h, kind, 0.1) - by_pieces(x, h, kind, 0.1))
    assert (
        error(norm_backward(dy, x, gamma, 0.1, kind, h, offset, "first_order", scale), naive)
        < NAIVE_DIFFERENCE
    )


@given(batches, lengths, widths, heads, st.sampled_from([*KINDS, "scale"]), st.booleans(), seeds)
def test_descent(b: int, t: int, d: int, h: int, kind: str, is_shared: bool, seed: int) -> None:
    """The pieces that share a gain add up, and what is added to it does not matter."""
    draw = Draw(seed)
    x, dy, gamma = draw(b, t, h * d), draw(b, t, h * d), draw.parameter(b, is_shared, d)
    own = gamma.detach().expand(b, d).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(by_pieces(x, h, kind) * gain(own, h, 1.0), own, dy)
    found = norm_descent(gamma, dy, x, EPS, kind, h, torch.tensor(0.37, dtype=torch.float64))
    assert found.shape == (b, d)
    assert error(found, own - 0.37 * gradient) < LIMIT


@given(
    batches,
    lengths,
    widths,
    heads,
    st.booleans(),
    offsets,
    st.sampled_from(["exact", "first_order"]),
    seeds,
)
def test_a_learned_scale(
    b: int, t: int, d: int, h: int, is_shared: bool, offset: float, gradient: str, seed: int
) -> None:
    """Linear in x: its difference is its gradient, whatever N is."""
    draw = Draw(seed)
    x, dy, gamma = draw(b, t, h * d), draw(b, t, h * d), draw.parameter(b, is_shared, d)
    expected = x * gain(gamma, h, offset)
    assert error(norm_forward(x, gamma, None, EPS, "scale", h, offset), expected) < LIMIT
    (dx,) = torch.autograd.grad(expected, x, dy)
    assert error(norm_backward(dy, x, gamma, EPS, "scale", h, offset, gradient, 3.0), dx) < LIMIT


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize(("kind", "h"), [("layer", 1), ("rms", 1), ("layer", 4), ("rms", 4)])
def test_float32_difference_keeps_its_digits(kind: str, h: int, size: float) -> None:
    """TINT.md section 4, item 7: with |g| around 1e-3 the naive float32 difference is off by far
    more.
    """
    draw = Draw(0)
    x, gamma = draw(4, 32, 64), draw(64 // h)
    dy = draw(4, 32, 64) * size
    g = dy * gain(gamma, h, 0.0)
    naive = 1000 * (by_pieces(x + g / 1000, h, kind) - by_pieces(x, h, kind)) / size
    found = (
        norm_backward(
            dy.float(), x.float(), gamma.float(), EPS, kind, h, 0.0, "first_order", 1000.0
        )
        / size
    )
    assert error(found, naive) < DIFFERENCE_FLOAT32
    if size <= 1e-3:
        x32, g32 = x.float(), g.float()
        naive32 = 1000 * (by_pieces(x32 + g32 / 1000, h, kind) - by_pieces(x32, h, kind)) / size
        assert error(naive32, naive) > 100 * DIFFERENCE_FLOAT32, "the naive form would have done"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_difference(kind: str, dtype: torch.dtype) -> None:
    draw = Draw(0)
    x, dy, gamma = (value.to(dtype) for value in (draw(2, 9, 32), draw(2, 9, 32), draw(32)))
    found = norm_backward(dy, x, gamma, EPS, kind, *ONE, "first_order", 1000.0)
    expected = norm_backward(
        dy.double(), x.double(), gamma.double(), EPS, kind, *ONE, "first_order", 1000.0
    )
    assert found.dtype == dtype
    assert error(found, expected) < HALF[dtype]
    assert cosine(found, expected) > UPDATE_COSINE_HALF


UPDATE_COSINE_HALF = 0.9999  # one rounding of the result, none of the difference


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_stay_in_half_precision_and_descents_leave_it(
    kind: str, dtype: torch.dtype
) -> None:
    draw = Draw(0)
    x, dy, gamma, beta = (
        value.to(dtype) for value in (draw(2, 9, 32), draw(2, 9, 32), draw(2, 32), draw(2, 32))
    )
    wide = [value.double() for value in (x, dy, gamma, beta)]
    forward = norm_forward(x, gamma, beta, EPS, kind, *ONE)
    descent = norm_descent(gamma, dy, x, EPS, kind, 1, torch.tensor(0.1))
    assert (forward.dtype, descent.dtype) == (dtype, torch.float32)
    assert error(forward, norm_forward(wide[0], wide[2], wide[3], EPS, kind, *ONE)) < HALF[dtype]
    assert (
        error(
            descent,
            norm_descent(wide[2], wide[1], wide[0], EPS, kind, 1, torch.tensor(0.1).double()),
        )
        < HALF[dtype]
    )


@given(batches, lengths, widths, seeds, st.floats(-5, 5))
def test_layer_norm_ignores_a_shift_of_its_input(
    b: int, t: int, d: int, seed: int, shift: float
) -> None:
    draw = Draw(seed)
    x, dy = draw(b, t, d), draw(b, t, d)
    args = (None, 0.1, "layer", *ONE, "first_order", 1000.0)
    assert error(norm_backward(dy, x + shift, *args), norm_backward(dy, x, *args)) < 1e2 * LIMIT
    assert (
        float(norm_backward(dy, x, *args).detach().sum(-1).abs().max()) < 1e-9
    )  # no gradient along the constant direction
