"""tintc.ir.ops.linear against torch.autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.support.shapes import Draw, batches, each, lengths, seeds, shared, widths
from tests.support.tolerances import HALF, PRIMITIVE, error
from tintc.ir.layout import PrefixSlot, Rows
from tintc.ir.ops.linear import (
    bias_descent,
    linear_backward,
    linear_descent,
    linear_forward,
    prefix,
)
from tintc.runtime.prefix import put_rows

LIMIT = PRIMITIVE[torch.float64]
biases = st.sampled_from(["none", "shared", "own"])


@given(batches, lengths, widths, widths, shared, biases, seeds)
def test_forward_and_backward(
    b: int, t: int, i: int, o: int, one_weight: bool, bias_kind: str, seed: int
) -> None:
    draw = Draw(seed)
    x, weight = draw(b, t, i), draw.parameter(b, one_weight, o, i)
    bias = None if bias_kind == "none" else draw.parameter(b, bias_kind == "shared", o)
    expected = torch.stack(
        [
            F.linear(x[n], w, c)
            for n, (w, c) in enumerate(zip(each(weight, b, 2), each(bias, b, 1), strict=True))
        ]
    )
    found = linear_forward(x, weight, bias)
    assert error(found, expected) < LIMIT
    dy = draw(b, t, o)
    (dx,) = torch.autograd.grad(expected, x, dy)
    assert error(linear_backward(dy, weight), dx) < LIMIT


@given(batches, lengths, widths, widths, shared, seeds)
def test_descent(b: int, t: int, i: int, o: int, is_shared: bool, seed: int) -> None:
    """Each sequence moves its own copy, by the sum over positions."""
    draw = Draw(seed)
    x, dy, inner_lr = draw(b, t, i), draw(b, t, o), torch.tensor(0.37, dtype=torch.float64)
    weight, bias = draw.parameter(b, is_shared, o, i), draw.parameter(b, is_shared, o)
    new_weight, new_bias = linear_descent(weight, dy, x, inner_lr), bias_descent(bias, dy, inner_lr)
    assert new_weight.shape == (b, o, i)
    assert new_bias.shape == (b, o)
    for n, (w, c) in enumerate(zip(each(weight, b, 2), each(bias, b, 1), strict=True)):
        assert w is not None
        assert c is not None
        gradients = torch.autograd.grad(F.linear(x[n], w, c), (w, c), dy[n], retain_graph=True)
        if not is_shared:  # autograd gives the gradient of the view's own rows
            assert gradients[0].shape == (o, i)
        assert error(new_weight[n], w - 0.37 * gradients[0]) < LIMIT
        assert error(new_bias[n], c - 0.37 * gradients[1]) < LIMIT


@given(batches, lengths, widths, widths, seeds)
def test_descent_is_additive_over_positions(b: int, t: int, i: int, o: int, seed: int) -> None:
    draw, inner_lr = Draw(seed), torch.tensor(0.5, dtype=torch.float64)
    weight, x, dy = draw(o, i), draw(b, t + 1, i), draw(b, t + 1, o)
    in_two = linear_descent(
        linear_descent(weight, dy[:, :t], x[:, :t], inner_lr), dy[:, t:], x[:, t:], inner_lr
    )
    assert error(linear_descent(weight, dy, x, inner_lr), in_two) < LIMIT
    assert (
        error(linear_descent(weight, torch.zeros_like(dy), x, inner_lr), weight.expand(b, o, i))
        == 0
    )


@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_prefix_reads_rows(rows: int, columns: int, transpose: bool, data: st.DataObject) -> None:
    stored = torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns)
    logical = stored.t() if transpose else stored
    start = data.draw(st.integers(0, len(logical) - 1))
    stop = data.draw(st.integers(start + 1, len(logical)))
    value = prefix(stored, start, stop, len(logical), transpose)
    assert torch.equal(value, logical[start:stop])
    assert (
        value.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    )  # a read, not a copy


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.data()
)
def test_prefix_reads_rows_of_every_period(
    heads: int, period: int, columns: int, transpose: bool, vector: bool, data: st.DataObject
) -> None:
    """What is a head's share of a product that alternates between q, k and v; `put_rows` writes it
    back, and nothing else.
    """
    rows, transpose = heads * period, transpose and not vector
    start = data.draw(st.integers(0, period - 1))
    stop = data.draw(st.integers(start + 1, period))
    stored = torch.arange(rows * columns, dtype=torch.float64).reshape(
        (columns, rows) if transpose else (rows, columns)
    )
    stored = stored[:, 0].clone() if vector else stored
    logical = stored.t() if transpose else stored
    inside = [r for r in range(rows) if start <= r % period < stop]
    value = prefix(stored, start, stop, period, transpose)
    assert torch.equal(value, logical[inside])
    slot = PrefixSlot(
        "slot", "weight", Rows(start, stop, period), transpose, tuple(value.shape), True, ()
    )
    other = -stored - 1
    expected = (other.t() if transpose else other).clone()
    expected[inside] = value
    put_rows(other, slot, value)
    assert torch.equal(other.t() if transpose else other, expected)
    assert torch.equal(prefix(other, start, stop, period, transpose), value)


@given(batches, lengths, widths, st.integers(1, 3), st.booleans(), seeds)
def test_a_bias_that_pieces_share(
    b: int, t: int, o: int, pieces: int, is_shared: bool, seed: int
) -> None:
    """A norm's shift is every head's: its gradients add up."""
    draw = Draw(seed)
    dy, bias = draw(b, t, pieces * o), draw.parameter(b, is_shared, o)
    found = bias_descent(bias, dy, torch.tensor(0.37, dtype=torch.float64))
    assert found.shape == (b, o)
    expected = bias.detach() - 0.37 * sum(piece.sum(1) for piece in dy.chunk(pieces, -1))
    assert error(found, expected.expand(b, o)) < LIMIT


@pytest.mark.parametrize("dtype", HALF)
def test_only_descents_leave_half_precision(dtype: torch.dtype) -> None:
    """The inner learning rate is a float32 scalar and promotes no activation."""
    draw, inner_lr = Draw(0), torch.tensor(0.37)
    x, dy, weight, bias = draw(2, 5, 4), draw(2, 5, 3), draw(3, 4), draw(3)
    low = [value.to(dtype) for value in (x, dy, weight, bias)]
    pairs = [
        (linear_forward(low[0], low[2], low[3]), linear_forward(x, weight, bias)),
        (linear_backward(low[1], low[2]), linear_backward(dy, weight)),
        (
            linear_descent(low[2], low[1], low[0], inner_lr),
            linear_descent(weight, dy, x, inner_lr.double()),
        ),
        (bias_descent(low[3], low[1], inner_lr), bias_descent(bias, dy, inner_lr.double())),
    ]
    for found, expected in pairs:
        assert error(found, expected) < HALF[dtype]
    assert [found.dtype for found, _ in pairs] == [dtype, dtype, torch.float32, torch.float32]
