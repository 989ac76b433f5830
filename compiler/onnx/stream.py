"""What the transformer back end writes in place, for ONNX, which has no writes: the residual stream
and the pages of prefix tokens.

Both remember which value lies where. A read that asks for what one write left is that value; others
cut and join values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tintc.compiler.onnx.elementwise import cast
from tintc.compiler.onnx.graph import BATCH, SEGMENT, TOKENS, Dim, Graph, Value
from tintc.compiler.onnx.shapes import cat, getitem
from tintc.ir.errors import CompilerBug

_Place = tuple[int, ...]  # first and last token, first and last coordinate


class _Piece(NamedTuple):
    """Coordinates start <= c < stop of the stream hold those of `value` from `offset` on."""

    start: int
    stop: int
    value: Value
    offset: int


class Stream:
    """(B, T, coordinates), zeros at first. A range that was written for the training segment alone
    is zero behind it: nothing reads what an earlier range left there, by the layout of memory
    slots."""

    requires_grad = False

    def __init__(self, graph: Graph, width: int, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph, dtype
        self.pieces: list[_Piece] = [
            _Piece(0, width, graph.constant(torch.zeros(1, 1, 1, dtype=dtype)), -1)
        ]

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Value:
        _, tokens, where = index
        length: Dim = TOKENS if tokens.stop is None else SEGMENT
        found = []
        for piece in self.pieces:
            start, stop = max(piece.start, where.start), min(piece.stop, where.stop)
            if start < stop:
                found.append(self._part(piece, start, stop, length, tokens.stop))
        return cat(self.graph, found, -1)

    def _part(
        self, piece: _Piece, start: int, stop: int, length: Dim, segment: Value | None
    ) -> Value:
        graph = self.graph
        if piece.offset < 0:
            dims = (BATCH, length, stop - start)
            return graph.add("Expand", [piece.value, graph.shape(dims)], dims, self.dtype)
        first = piece.offset + start - piece.start
        value: Value = getitem(graph, piece.value, (Ellipsis, slice(first, first + stop - start)))
        if value.dims[1] == length:
            return value
        if length == SEGMENT:
            return getitem(graph, value, (slice(None), slice(None, segment)))
        rest = graph.add("Sub", [graph.sizes[TOKENS], graph.sizes[SEGMENT]], (1,), torch.int64)
        zeros = [graph.size(BATCH), rest, graph.size(stop - start)]
        shape = graph.add("Concat", zeros, (3,), torch.int64, axis=0)
        tail = graph.add(
            "Expand",
            [graph.constant(torch.zeros(1, 1, 1, dtype=self.dtype)), shape],
            value.dims,
            self.dtype,
        )
        return graph.add(
            "Concat", [value, tail], (value.dims[0], TOKENS, value.dims[2]), self.dtype, axis=1
        )

    def __setitem__(self, index: tuple[slice, slice, slice], value: Value) -> None:
        where = index[2]
        kept = [_Piece(where.start, where.stop, cast(self.graph, value, self.dtype), 0)]
        for piece in self.pieces:
            for start, stop in (
                (piece.start, min(piece.stop, where.start)),
                (max(piece.start, where.stop), piece.stop),
            ):
                if start < stop:
                    offset = (
                        piece.offset if piece.offset < 0 else piece.offset + start - piece.start
                    )
                    kept.append(_Piece(start, stop, piece.value, offset))
        self.pieces = sorted(kept, key=lambda piece: piece.start)


class Page:
    """A page of prefix tokens: (K, D_sim), and what descents put in its places, one a sequence.
    names: of each place's weights.
    """

    requires_grad = False

    def __init__(
        self,
        graph: Graph,
        page: Tensor,
        names: dict[tuple[int, ...], str],
        written: dict[tuple[int, ...], Value] | None = None,
    ) -> None:
        self.graph, self.page, self.names, self.written = graph, page, names, dict(written or {})
        self.shape = tuple(page.shape)

    def expand(self, *_: Dim) -> Page:
        """One for each sequence."""
        return Page(self.graph, self.page, self.names, self.written)

    def clone(self) -> Page:
        return self.expand()

    def __getitem__(self, index: Any) -> Value:
        place = self._place(index)
        if place in self.written:
            written: Value = self.written[place]
            return written
        first, last, start, stop = place
        name = self.names.get(place, "page")
        return self.graph.weight(name, self.page[first:last, start:stop])

    def __setitem__(self, index: Any, value: Value) -> None:
        self.written[self._place(index)] = cast(self.graph, value, self.page.dtype)

    def _place(self, index: Any) -> _Place:
        _, tokens, coordinates = index
        place = (tokens.start, tokens.stop, coordinates.start, coordinates.stop)
        if any(other != place and _overlap(other, place) for other in self.written):
            raise CompilerBug(f"places {place} and {list(self.written)} of a page overlap")
        return place


def _overlap(a: _Place, b: _Place) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
