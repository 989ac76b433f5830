"""tintc.runtime.backends.transformer.modules.linear against tintc.ir.ops.linear, tile by tile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.around import (
    F64,
    Around,
    Held,
    apply,
    arounds,
    assert_same,
    cells,
    in_float32,
    tile_of,
    tiles,
    vectors,
)
from tests.support.shapes import shared
from tests.support.tolerances import PRIMITIVE, error
from tintc.ir.layout import Range as Span
from tintc.ir.ops.linear import bias_descent, linear_backward, linear_descent, linear_forward
from tintc.runtime.backends.transformer.modules.activation import ActivationForward
from tintc.runtime.backends.transformer.modules.linear import (
    BiasDescent,
    BiasForward,
    LinearBackward,
    LinearDescent,
    LinearForward,
    VectorDescent,
    VectorForward,
)
from tintc.runtime.backends.transformer.modules.parts import Range, read
from tintc.runtime.backends.transformer.pages import read_tile, write_tile

moderate = settings(max_examples=50)


def rate() -> Tensor:
    return torch.tensor(0.37, dtype=F64, requires_grad=True)


def numbers_of(held: Held) -> Tensor:
    """Which (token, coordinate) of the page hold a number of the tile: its place without
    padding.
    """
    ones = torch.ones(held.tile.rows.stop, held.tile.columns.stop)
    return write_tile(torch.zeros(held.tokens, held.hidden), ones, held.tile).bool()


def two_ranges(at: Around, first: int, second: int, is_first: bool) -> tuple[Range, Range]:
    """Ranges of two sizes, in either order in the stream."""
    if is_first:
        return at.range(first), at.range(second)
    later = at.range(second)
    return at.range(first), later


@given(arounds(), tiles(), shared, st.booleans(), st.booleans())
@moderate
def test_forward(at: Around, held: Held, is_shared: bool, add: bool, in_order: bool) -> None:
    x, y = two_ranges(at, held.tile.columns.size, held.tile.rows.size, in_order)
    stream, page = at.stream(), at.page(is_shared, held.tokens, held.hidden)
    found = apply(
        LinearForward(**held.sizes, add=add),
        stream,
        held.code,
        page,
        held.place,
        x,
        y,
        writes=cells(stream, y),
    )
    expected = linear_forward(read(stream, x), read_tile(page, held.tile))
    assert_same(read(found, y), expected + read(stream, y) if add else expected, (stream, page))


@given(arounds(), tiles(), shared, st.booleans(), st.booleans())
@moderate
def test_backward(at: Around, held: Held, is_shared: bool, add: bool, in_order: bool) -> None:
    dy, dx = two_ranges(at, held.tile.rows.size, held.tile.columns.size, in_order)
    stream, page = at.stream(), at.page(is_shared, held.tokens, held.hidden)
    found = apply(
        LinearBackward(**held.sizes, add=add),
        stream,
        held.code,
        page,
        held.place,
        dy,
        dx,
        writes=cells(stream, dx),
    )
    expected = linear_backward(read(stream, dy), read_tile(page, held.tile))
    assert_same(read(found, dx), expected + read(stream, dx) if add else expected, (stream, page))


@given(arounds(), tiles(), shared, st.booleans())
@moderate
def test_descent(at: Around, held: Held, is_shared: bool, in_order: bool) -> None:
    """Each sequence gets a page of its own; padding and all else in it stays bit for bit."""
    dy, x = two_ranges(at, held.tile.rows.size, held.tile.columns.size, in_order)
    stream, page, inner_lr = at.stream(), at.page(is_shared, held.tokens, held.hidden), rate()
    found = apply(
        LinearDescent(**held.sizes),
        page,
        held.code,
        stream,
        held.place,
        dy,
        x,
        inner_lr,
        writes=numbers_of(held),
    )
    assert found.shape == (at.batch, held.tokens, held.hidden)
    expected = linear_descent(
        read_tile(page, held.tile), read(stream, dy), read(stream, x), inner_lr
    )
    assert_same(read_tile(found, held.tile), expected, (page, stream, inner_lr))


@given(arounds(), tiles(), shared)
@moderate
def test_bias(at: Around, held: Held, is_shared: bool) -> None:
    """Forward and descent; the biases stand behind the rows, S in each token."""
    biases, y = held.biases, at.range(held.tile.rows.size)
    stream, page, inner_lr = at.stream(), at.page(is_shared, held.tokens, held.hidden), rate()
    sizes = {**biases.sizes, "pieces": 1}
    value = read_tile(page, biases.tile).squeeze(-1)
    found = apply(
        BiasForward(**sizes), stream, held.code, page, biases.place, y, writes=cells(stream, y)
    )
    assert_same(read(found, y), read(stream, y) + value.unsqueeze(-2), (stream, page))
    moved = apply(
        BiasDescent(**sizes),
        page,
        held.code,
        stream,
        biases.place,
        y,
        inner_lr,
        writes=numbers_of(biases),
    )
    expected = bias_descent(value, read(stream, y), inner_lr)
    assert_same(read_tile(moved, biases.tile).squeeze(-1), expected, (page, stream, inner_lr))


@given(arounds(), vectors(), shared, st.booleans(), st.integers(1, 3))
@moderate
def test_vector(
    at: Around, drawn: tuple[Held, int], is_shared: bool, add: bool, pieces: int
) -> None:
    """Forward and descent of a vector that one prefix token holds, for one or for several pieces of
    a range.
    """
    held, size = drawn[0], pieces * drawn[1]
    y = at.range(size)
    stream, page, inner_lr = at.stream(), at.page(is_shared, held.tokens, held.hidden), rate()
    value = read_tile(page, held.tile).squeeze(-1)
    layer = VectorForward(size=size, width=held.width, pieces=pieces, add=add)
    found = apply(layer, stream, held.code, page, held.place, y, writes=cells(stream, y))
    whole = torch.cat([value] * pieces, -1).unsqueeze(-2).expand(at.batch, at.used, size)
    assert_same(read(found, y), whole + read(stream, y) if add else whole, (stream, page))
    descent = VectorDescent(size=size, width=held.width, pieces=pieces)
    moved = apply(
        descent, page, held.code, stream, held.place, y, inner_lr, writes=cells(page, held.place)
    )
    expected = bias_descent(value, read(stream, y), inner_lr)
    assert_same(read_tile(moved, held.tile).squeeze(-1), expected, (page, stream, inner_lr))


def cut(rows: int, columns: int, tokens: int, width: int, groups: int, pieces: int) -> list[Held]:
    """A matrix in tiles of at most groups * K rows and pieces * d columns, a page each."""
    found = []
    for top in range(0, rows, groups * tokens):
        for left in range(0, columns, pieces * width):
            r, c = (
                Span(top, min(top + groups * tokens, rows)),
                Span(left, min(left + pieces * width, columns)),
            )
            part = tile_of(r.size, c.size, tokens, width).tile
            tile = type(part)(len(found), r, c, part.tokens, part.coordinates, part.row_width)
            found.append(Held(tile, tokens, width, groups * (pieces * width + 1)))
    return found


def part(where: Range, span: Span) -> Range:
    return Range(where.start + span.start, where.start + span.stop, where.tokens)


@given(
    arounds(),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 13),
    st.integers(1, 13),
    st.integers(1, 2),
    st.integers(1, 2),
    shared,
)
@moderate
def test_tiles_add_up(
    at: Around,
    k: int,
    more: int,
    rows: int,
    columns: int,
    groups: int,
    pieces: int,
    is_shared: bool,
) -> None:
    """A matrix in several tiles: column tiles add into one range forward, row tiles backward;
    descent moves each on its own.
    """
    helds = cut(rows, columns, k, k + more, groups, pieces)
    x, y, dx, dy = at.range(columns), at.range(rows), at.range(columns), at.range(rows)
    stream, inner_lr = at.stream(), rate()
    weight = at.draw.parameter(at.batch, is_shared, rows, columns)
    lead = () if is_shared else (at.batch,)
    pages = [
        write_tile(torch.zeros(*lead, k, held.hidden, dtype=F64), weight, held.tile)
        for held in helds
    ]
    now = stream
    for held, page in zip(helds, pages, strict=True):
        rows_of, columns_of = held.tile.rows, held.tile.columns
        forward, backward = (
            LinearForward(**held.sizes, add=columns_of.start > 0),
            LinearBackward(**held.sizes, add=rows_of.start > 0),
        )
        now = forward(now, held.code, page, held.place, part(x, columns_of), part(y, rows_of))
        now = backward(now, held.code, page, held.place, part(dy, rows_of), part(dx, columns_of))
        moved = LinearDescent(**held.sizes)(
            page, held.code, now, held.place, part(dy, rows_of), part(x, columns_of), inner_lr
        )
        expected = linear_descent(weight, read(stream, dy), read(stream, x), inner_lr)
        assert (
            error(
                read_tile(moved, held.tile),
                expected[:, rows_of.start : rows_of.stop, columns_of.start : columns_of.stop],
            )
            < 1e-9
        )
    assert_same(read(now, y), linear_forward(read(stream, x), weight), (stream, weight))
    assert_same(read(now, dx), linear_backward(read(stream, dy), weight), (stream, weight))


def test_gradients_reach_through_a_chain() -> None:
    """Forward, activation over the same coordinates' neighbours, descent, and forward again with
    the new page: as by the operators.
    """
    at, held = Around(0, 2, 5, 4), tile_of(7, 5, 3, 4, extra=2)
    x, y, z, again = at.range(5), at.range(7), at.range(7), at.range(7)
    stream, page, inner_lr = at.stream(), at.page(True, held.tokens, held.hidden), rate()
    code, place = held.code, held.place
    forward, descent, act = (
        LinearForward(**held.sizes),
        LinearDescent(**held.sizes),
        ActivationForward(width=held.width, kind="tanh"),
    )

    def chain(stream: Tensor, page: Tensor, inner_lr: Tensor) -> Tensor:
        now = act(forward(stream, code, page, place, x, y), code, y, z)
        new = descent(page, code, now, place, z, x, inner_lr)
        return read(forward(now, code, new, place, x, again), again)

    weight = read_tile(page, held.tile)
    moved = linear_descent(
        weight, torch.tanh(linear_forward(read(stream, x), weight)), read(stream, x), inner_lr
    )
    assert_same(
        chain(stream, page, inner_lr),
        linear_forward(read(stream, x), moved),
        (stream, page, inner_lr),
        kind="chain",
    )
    assert torch.autograd.gradcheck(chain, (stream, page, inner_lr))


@pytest.mark.parametrize("is_shared", [True, False])
def test_float32(is_shared: bool) -> None:
    at, held = Around(1, 3, 6, None), tile_of(17, 9, 5, 6)
    x, y = at.range(9), at.range(17)
    stream, page, inner_lr = at.stream(), at.page(is_shared, held.tokens, held.hidden), rate()
    weight, limit = read_tile(page, held.tile), PRIMITIVE[torch.float32]
    found = in_float32(LinearForward(**held.sizes), stream, held.code, page, held.place, x, y)
    assert error(read(found, y), linear_forward(read(stream, x), weight)) < limit
    found = in_float32(LinearBackward(**held.sizes), stream, held.code, page, held.place, y, x)
    assert error(read(found, x), linear_backward(read(stream, y), weight)) < limit
    found = in_float32(
        LinearDescent(**held.sizes), page, held.code, stream, held.place, y, x, inner_lr
    )
    assert (
        error(
            read_tile(found, held.tile),
            linear_descent(weight, read(stream, y), read(stream, x), inner_lr),
        )
        < limit
    )
