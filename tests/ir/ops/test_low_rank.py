"""tintc.ir.ops.low_rank: factors against products with the weights and biases that they stand
for.
"""

from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, batches, lengths, seeds, widths
from tests.support.tolerances import HALF, PRIMITIVE, error
from tintc.ir.ops.linear import bias_descent, linear_backward, linear_descent, linear_forward
from tintc.ir.ops.low_rank import concatenate, low_rank, weights_of

LIMIT = PRIMITIVE[torch.float64]
ETA = torch.tensor(0.37, dtype=torch.float64)


def factors(
    draw: Draw, b: int, s: int, i: int, o: int, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(inputs x_s, gradients dy_s) of each step."""
    return [draw(b, s, i) for _ in range(steps)], [draw(b, s, o) for _ in range(steps)]


def materialized(
    weight: Tensor, bias: Tensor, xs: list[Tensor], dys: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """(W - eta sum_s dy_s x_s^T, b - eta sum_s dy_s) by explicit sums over all steps, one a
    sequence.
    """
    grown = sum(torch.einsum("bso,bsi->boi", dy, x) for x, dy in zip(xs, dys, strict=True))
    return weight - ETA * grown, bias - ETA * sum(dy.sum(1) for dy in dys)


@given(batches, lengths, lengths, widths, widths, st.integers(1, 3), st.booleans(), seeds)
def test_forward(
    b: int, t: int, s: int, i: int, o: int, steps: int, with_bias: bool, seed: int
) -> None:
    draw = Draw(seed)
    x, weight, bias = draw(b, t, i), draw(o, i), draw(o)
    xs, dys = factors(draw, b, s, i, o, steps)
    own_weight, own_bias = materialized(weight, bias, xs, dys)
    expected = torch.einsum("boi,bti->bto", own_weight, x) + (
        own_bias[:, None] if with_bias else bias
    )
    found = low_rank(
        linear_forward(x, weight, bias), x, concatenate(xs), concatenate(dys), ETA, with_bias
    )
    assert error(found, expected) < LIMIT


@given(batches, lengths, lengths, widths, widths, st.integers(1, 3), seeds)
def test_backward(b: int, t: int, s: int, i: int, o: int, steps: int, seed: int) -> None:
    """Keys and values change sides; equal to autograd through the product with the own weight."""
    draw = Draw(seed)
    x, dy, weight = draw(b, t, i), draw(b, t, o), draw(o, i)
    xs, dys = factors(draw, b, s, i, o, steps)
    own, _ = materialized(weight, draw(o), xs, dys)
    (expected,) = torch.autograd.grad(torch.einsum("boi,bti->bto", own, x), x, dy)
    found = low_rank(linear_backward(dy, weight), dy, concatenate(dys), concatenate(xs), ETA, False)
    assert error(found, expected) < LIMIT


@given(batches, lengths, widths, widths, st.integers(1, 3), seeds)
def test_equals_descents_in_turn(b: int, s: int, i: int, o: int, steps: int, seed: int) -> None:
    draw = Draw(seed)
    x, weight, bias = draw(b, s, i), draw(o, i), draw(o)
    xs, dys = factors(draw, b, s, i, o, steps)
    own = reduce(
        lambda w, pair: linear_descent(w, pair[1], pair[0], ETA), zip(xs, dys, strict=True), weight
    )
    shift = reduce(lambda c, dy: bias_descent(c, dy, ETA), dys, bias)
    found = low_rank(
        linear_forward(x, weight, bias), x, concatenate(xs), concatenate(dys), ETA, True
    )
    assert error(found, linear_forward(x, own, shift)) < LIMIT


@given(batches, lengths, lengths, widths, st.booleans(), seeds)
def test_weights_of(b: int, t: int, s: int, i: int, with_bias: bool, seed: int) -> None:
    draw = Draw(seed)
    x, keys = draw(b, t, i), draw(b, s, i)
    expected = -ETA * (torch.einsum("bti,bsi->bts", x, keys) + float(with_bias))
    assert error(weights_of(x, keys, ETA, with_bias), expected) < LIMIT


def test_no_gradient_changes_nothing() -> None:
    draw = Draw(0)
    x, keys, y = draw(2, 5, 4), draw(2, 3, 4), draw(2, 5, 6)
    assert torch.equal(
        low_rank(y, x, keys, torch.zeros(2, 3, 6, dtype=torch.float64), ETA, True), y
    )


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays(dtype: torch.dtype) -> None:
    draw = Draw(0)
    wide = [
        draw(2, 5, 6).to(dtype),
        draw(2, 5, 4).to(dtype),
        draw(2, 3, 4).to(dtype),
        draw(2, 3, 6).to(dtype),
    ]
    found = low_rank(*wide, ETA, True)
    assert found.dtype == dtype
    assert error(found, low_rank(*(x.double() for x in wide), ETA, True)) < HALF[dtype]
