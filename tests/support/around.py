"""What the tests of single modules share: a stream and pages full of random numbers, and a call
that watches all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, batches, lengths, seeds
from tests.support.tolerances import MODULE, error, measured
from tintc.ir.layout import Range as Span
from tintc.ir.layout import Tile
from tintc.runtime.backends.transformer.modules.parts import Layer, Place, Range, position_code

F64 = torch.float64


@dataclass
class Around:
    """A module's surroundings: B sequences of T tokens, of which it works on the first n (None: on
    all).
    """

    seed: int
    batch: int
    length: int
    tokens: int | None

    def __post_init__(self) -> None:
        self.draw = Draw(self.seed)
        self.end = 0

    def number(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self.draw.generator))

    def range(self, size: int) -> Range:
        """The next range of the stream, a few coordinates behind the last one."""
        start = self.end + self.number(0, 2)
        self.end = start + size
        return Range(start, self.end, self.tokens)

    def stream(self, scale: float = 1.0) -> Tensor:
        """Random numbers in all ranges handed out and beyond, as a leaf that needs a gradient."""
        return (
            self.draw(self.batch, self.length, self.end + self.number(0, 2), scale=scale)
            .detach()
            .requires_grad_()
        )

    def page(self, is_shared: bool, tokens: int, hidden: int) -> Tensor:
        """(K, D_sim) or (B, K, D_sim) of random numbers: padding, too, is none of a module's
        business.
        """
        return self.draw.parameter(self.batch, is_shared, tokens, hidden)

    @property
    def used(self) -> int:
        return self.length if self.tokens is None else self.tokens


@st.composite
def arounds(draw: st.DrawFn) -> Around:
    length = draw(lengths)
    return Around(draw(seeds), draw(batches), length, draw(st.none() | st.integers(1, length)))


@dataclass(frozen=True)
class Held:
    """A tile, the K and d of its page, and the page's width. `biases` is the tile of its rows'
    biases.
    """

    tile: Tile
    tokens: int
    width: int
    hidden: int

    @property
    def sizes(self) -> dict[str, int]:
        tile = self.tile
        pieces = math.ceil(tile.row_width / self.width)
        sizes = {
            "rows": tile.rows.size,
            "columns": tile.columns.size,
            "tokens": tile.tokens.size,
            "rows_each": tile.groups,
        }
        return {**sizes, "pieces": pieces, "width": self.width}

    @property
    def biases(self) -> Held:
        tile = self.tile
        where = Span(tile.coordinates.stop, tile.coordinates.stop + tile.groups)
        return Held(
            Tile(0, tile.rows, Span(0, 1), tile.tokens, where, 1),
            self.tokens,
            self.width,
            self.hidden,
        )

    @property
    def code(self) -> Tensor:
        return position_code(self.tokens, self.width, F64)

    @property
    def place(self) -> Place:
        tile = self.tile
        return Place(
            tile.tokens.start, tile.tokens.stop, tile.coordinates.start, tile.coordinates.stop
        )


def tile_of(
    rows: int,
    columns: int,
    tokens: int,
    width: int,
    *,
    start: int = 0,
    page: int = 0,
    extra: int = 0,
) -> Held:
    """A whole matrix in one tile, as `assign_prefix_slots` lays it out, from coordinate `start` of
    its tokens.
    """
    used = min(tokens, rows)
    row_width = math.ceil(columns / width) * width
    stop = start + math.ceil(rows / used) * row_width
    tile = Tile(page, Span(0, rows), Span(0, columns), Span(0, used), Span(start, stop), row_width)
    return Held(tile, tokens, width, stop + tile.groups + extra)


@st.composite
def tiles(draw: st.DrawFn) -> Held:
    """Nothing divides: rows not by K, columns not by d; K < d and K = d; one row, one column."""
    tokens = draw(st.integers(1, 5))
    width = draw(st.integers(tokens, tokens + 4))
    rows, columns = draw(st.integers(1, min(12, tokens * width))), draw(st.integers(1, 12))
    return tile_of(
        rows, columns, tokens, width, start=draw(st.integers(0, 3)), extra=draw(st.integers(0, 3))
    )


@st.composite
def vectors(draw: st.DrawFn) -> tuple[Held, int]:
    """(a vector in one token of a page, its size)."""
    tokens = draw(st.integers(1, 5))
    width, size = draw(st.integers(tokens, tokens + 4)), draw(st.integers(1, 9))
    token, start = draw(st.integers(0, tokens - 1)), draw(st.integers(0, 3))
    tile = Tile(0, Span(0, size), Span(0, 1), Span(token, token + 1), Span(start, start + size), 1)
    return Held(tile, tokens, width, start + size + draw(st.integers(0, 3))), size


def cells(state: Tensor, *written: Range | Place) -> Tensor:
    """Which (token, coordinate) of a stream or page are written."""
    mask = torch.zeros(state.shape[-2:], dtype=torch.bool)
    for where in written:
        rows = (
            slice(None, where.tokens)
            if isinstance(where, Range)
            else slice(where.first, where.last)
        )
        mask[rows, where.start : where.stop] = True
    return mask


def apply(layer: Layer, state: Tensor, code: Tensor, *args: Any, writes: Tensor) -> Tensor:
    """The stream or page that the layer makes of `state`, recorded by torch.

    Whatever is not written stays bit for bit; tensors that are read stay as they are; while torch
    records nothing is changed in place, and a page never is; with and without recording the result
    is the same. The formula gives the number of parameters.
    """
    assert eval(layer.formula, {"ceil": math.ceil}, dict(layer.sizes)) == sum(
        p.numel() for p in layer.parameters()
    ), layer.formula
    inputs = [x for x in (state, code, *args) if isinstance(x, Tensor)]
    before = [x.detach().clone() for x in inputs]
    found: Tensor = layer(state, code, *args)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True)), (
        "an input was changed while torch recorded"
    )
    whole = state.detach().expand_as(found)
    assert torch.equal(found.detach()[..., ~writes], whole[..., ~writes]), (
        "something else was written"
    )
    with torch.no_grad():
        given = state.detach().clone()
        unrecorded = layer(given, code, *args)
    # torch's kernels round differently where a range is read in place and where it is copied first.
    assert error(unrecorded, found) < 1e-12
    assert torch.equal(unrecorded[..., ~writes], whole[..., ~writes])
    assert all(torch.equal(x, old) for x, old in zip(inputs[1:], before[1:], strict=True))
    _, take = layer.gate(code)
    if not take[-1]:  # input tokens take nothing: the state is a page
        assert torch.equal(given, before[0]), "a page was changed in place"
    return found


def assert_same(
    found: Tensor,
    expected: Tensor,
    inputs: Sequence[Tensor],
    *,
    limit: float = MODULE,
    kind: str = "value",
) -> None:
    """Values agree, and so do the gradients of a weighted sum of them by every input."""
    assert measured(f"modules: {kind}, float64", error(found, expected)) < limit
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(expected.shape, generator=generator, dtype=F64)
    both = [gradients((value * weights).sum(), inputs) for value in (found, expected)]
    for x, ours, wanted in zip(inputs, *both, strict=True):
        assert ours.shape == wanted.shape == x.shape
        assert measured(f"modules: gradient of {kind}, float64", error(ours, wanted)) < 10 * limit


def gradients(total: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """By each input; zeros for what the total does not depend on."""
    found = (
        torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
        if total.requires_grad
        else [None] * len(inputs)
    )
    return [
        torch.zeros_like(x) if gradient is None else gradient
        for x, gradient in zip(inputs, found, strict=True)
    ]


def in_float32(layer: Layer, *args: Any) -> Tensor:
    """What the layer gives when it and every floating-point argument are float32."""
    low = [
        x.detach().float() if isinstance(x, Tensor) and x.dtype == F64 and x.ndim else x
        for x in args
    ]
    with torch.no_grad():
        found: Tensor = layer.float()(*low)
    assert found.dtype == torch.float32
    return found
