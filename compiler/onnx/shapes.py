"""Operators of the export that move numbers: slices, shapes, joins, look-ups. See `operators.py`;
legend in `graph.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeVar

import torch

from tintc.compiler.onnx.graph import SEGMENT, TYPES, Dim, Graph, Value

FUNCTIONS: dict[str, Callable[..., Any]] = {}
Function = TypeVar("Function", bound=Callable[..., Any])
_LAST = 2**62  # past every end


def operator(*names: str) -> Callable[[Function], Function]:
    """Registers what stands for torch functions and methods of these names."""

    def register(function: Function) -> Function:
        FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return register


def value_of(graph: Graph, x: Any, dtype: torch.dtype | None = None) -> Value:
    """Numbers and tensors as constants."""
    return x if isinstance(x, Value) else graph.constant(x, dtype)


def broadcast(*shapes: Sequence[Dim]) -> tuple[Dim, ...]:
    """Dimensions of an elementwise result."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((dim for dim in dims if dim != 1), 1) for dims in zip(*padded, strict=True))


def reshape(graph: Graph, x: Value, dims: Sequence[Dim]) -> Value:
    """The same numbers in other dimensions: the first named one that stays in its place is copied,
    one more is what remains. Back in the dimensions that it had, it is what it was.
    """
    if tuple(dims) == x.dims:
        return x
    before = graph.source(x, "Reshape")
    if before is not None and before.dims == tuple(dims):
        return before
    target: list[Dim] = [
        0 if isinstance(dim, str) and i < x.ndim and x.dims[i] == dim else dim
        for i, dim in enumerate(dims)
    ]
    named = [i for i, dim in enumerate(target) if isinstance(dim, str)]
    if len(named) == 1:
        target[named[0]] = -1
    return graph.add("Reshape", [x, graph.shape(target)], dims, x.dtype)


def product(dims: Sequence[Dim]) -> Dim:
    """How many numbers these dimensions have; of named ones, a name."""
    known = math.prod(dim for dim in dims if isinstance(dim, int))
    named = [dim for dim in dims if isinstance(dim, str)]
    return known if not named else ".".join(([str(known)] if known != 1 else []) + named)


@operator("unflatten")
def unflatten(graph: Graph, x: Value, dim: int, sizes: Sequence[Dim]) -> Value:
    dim %= x.ndim
    known = math.prod(size for size in sizes if isinstance(size, int) and size != -1)
    whole = x.dims[dim]
    rest = whole // known if isinstance(whole, int) else whole
    return reshape(
        graph,
        x,
        (*x.dims[:dim], *(rest if size == -1 else size for size in sizes), *x.dims[dim + 1 :]),
    )


@operator("flatten")
def flatten(graph: Graph, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return reshape(
        graph, x, (*x.dims[:start], product(x.dims[start : end + 1]), *x.dims[end + 1 :])
    )


@operator("view_as")
def view_as(graph: Graph, x: Value, other: Value) -> Value:
    return reshape(graph, x, other.dims)


@operator("unsqueeze")
def unsqueeze(graph: Graph, x: Value, dim: int) -> Value:
    at = dim % (x.ndim + 1)
    return graph.add("Unsqueeze", [x, graph.ints(at)], (*x.dims[:at], 1, *x.dims[at:]), x.dtype)


@operator("squeeze")
def squeeze(graph: Graph, x: Value, dim: int) -> Value:
    at = dim % x.ndim
    if x.dims[at] != 1:
        return x
    return graph.add("Squeeze", [x, graph.ints(at)], (*x.dims[:at], *x.dims[at + 1 :]), x.dtype)


@operator("transpose")
def transpose(graph: Graph, x: Value, dim0: int, dim1: int) -> Value:
    order = list(range(x.ndim))
    a, b = dim0 % x.ndim, dim1 % x.ndim
    order[a], order[b] = order[b], order[a]
    before = graph.source(x, "Transpose", perm=order)  # an exchange is its own inverse
    if before is not None:
        return before
    return graph.add("Transpose", [x], [x.dims[i] for i in order], x.dtype, perm=order)


@operator("t")
def t(graph: Graph, x: Value) -> Value:
    return transpose(graph, x, 0, 1)


@operator("contiguous", "clone", "detach")
def unchanged(graph: Graph, x: Value) -> Value:
    return x


@operator("expand")
def expand(graph: Graph, x: Value, *sizes: Dim) -> Value:
    wanted = broadcast(x.dims, sizes)
    if wanted == x.dims:
        return x
    return graph.add("Expand", [x, graph.shape(wanted)], wanted, x.dtype)


@operator("cat")
def cat(graph: Graph, parts: Sequence[Value], dim: int = 0) -> Value:
    if len(parts) == 1:
        return parts[0]
    values = _of_one_type(graph, [value_of(graph, part) for part in parts])
    at = dim % values[0].ndim
    along = [value.dims[at] for value in values]
    if all(isinstance(size, int) for size in along):
        size: Dim = sum(int(size) for size in along)
    else:
        size = f"{len(along)}*{along[0]}" if len(set(along)) == 1 else "+".join(map(str, along))
    return graph.add(
        "Concat",
        values,
        (*values[0].dims[:at], size, *values[0].dims[at + 1 :]),
        values[0].dtype,
        axis=at,
    )


def _of_one_type(graph: Graph, values: list[Value]) -> list[Value]:
    """As torch.cat has them: in the widest type of them all."""
    dtype = reduce(torch.promote_types, (value.dtype for value in values))
    return [
        value
        if value.dtype == dtype
        else graph.add("Cast", [value], value.dims, dtype, to=TYPES[dtype])
        for value in values
    ]


@operator("stack")
def stack(graph: Graph, parts: Sequence[Value], dim: int = 0) -> Value:
    return cat(graph, [unsqueeze(graph, value_of(graph, part), dim) for part in parts], dim)


@operator("pad")
def pad(
    graph: Graph,
    x: Value,
    padding: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Value:
    if not any(padding):
        return x
    if x.dtype == torch.bool:  # runtimes have no kernel of it for bool
        numbers = graph.add("Cast", [x], x.dims, torch.int64, to=TYPES[torch.int64])
        padded = pad(graph, numbers, padding, mode, value)
        return graph.add("Cast", [padded], padded.dims, torch.bool, to=TYPES[torch.bool])
    count = len(padding) // 2
    before = [0] * (x.ndim - count) + list(reversed(padding[0::2]))
    after = [0] * (x.ndim - count) + list(reversed(padding[1::2]))
    dims = [
        dim + a + b if isinstance(dim, int) else _longer(dim, a + b)
        for dim, a, b in zip(x.dims, before, after, strict=True)
    ]
    return graph.add(
        "Pad", [x, graph.ints(*before, *after), graph.constant(value or 0, x.dtype)], dims, x.dtype
    )


def _longer(dim: str, by: int) -> str:
    """A named dimension that was cut by as many is whole again."""
    whole = dim.removesuffix(_cut(by))
    return whole if by and whole != dim else dim


def _cut(by: int) -> str:
    """What a named dimension's name ends in that lost its first numbers."""
    return f"-{by}"


@operator("repeat_interleave")
def repeat_interleave(graph: Graph, x: Value, repeats: int, dim: int) -> Value:
    wide = expand(
        graph, unsqueeze(graph, x, dim + 1), *x.dims[: dim + 1], repeats, *x.dims[dim + 1 :]
    )
    size = x.dims[dim]
    assert isinstance(size, int)
    return reshape(graph, wide, (*x.dims[:dim], size * repeats, *x.dims[dim + 1 :]))


@operator("flip")
def flip(graph: Graph, x: Value, *dims: int) -> Value:
    bounds = [graph.ints(*(number for _ in dims)) for number in (-1, -_LAST)]
    axes, steps = graph.ints(*(dim % x.ndim for dim in dims)), graph.ints(*(-1 for _ in dims))
    return graph.add("Slice", [x, *bounds, axes, steps], x.dims, x.dtype)


@operator("__getitem__")
def getitem(graph: Graph, x: Value, index: Any) -> Value:
    """Slices by numbers or to a length that the graph computes, one row, rows by a tensor of whole
    numbers.
    """
    if isinstance(index, Value):
        return gather(graph, x, index)
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (x.ndim - sum(item is not None for item in items) + 1)
    axis = 0
    for item in items:
        if item is None:
            x = unsqueeze(graph, x, axis)
        elif isinstance(item, int):
            x = gather(graph, x, graph.constant(item), axis)
            continue
        else:
            x = _sliced(graph, x, axis, item.start, item.stop)
        axis += 1
    return x


def _sliced(
    graph: Graph, x: Value, axis: int, start: int | None, stop: int | Value | None
) -> Value:
    size = x.dims[axis]
    if isinstance(stop, Value):
        if size == SEGMENT:
            return x
        length: Dim = SEGMENT
        last = reshape(graph, stop, (1,))
    else:
        if not start and (stop is None or stop == size):
            return x
        length = (
            len(range(*slice(start, stop).indices(size)))
            if isinstance(size, int)
            else _part(size, start or 0, stop)
        )
        last = graph.ints(_LAST if stop is None else stop)
    dims = (*x.dims[:axis], length, *x.dims[axis + 1 :])
    return graph.add("Slice", [x, graph.ints(start or 0), last, graph.ints(axis)], dims, x.dtype)


def _part(size: str, start: int, stop: int | None) -> str:
    """The name of what a slice leaves of a named dimension."""
    return f"{size}{_cut(start)}" if start > 0 and stop is None else f"part_of_{size}"


def gather(graph: Graph, table: Value, index: Value, axis: int = 0) -> Value:
    """Rows of a table."""
    dims = (*table.dims[:axis], *index.dims, *table.dims[axis + 1 :])
    return graph.add("Gather", [table, index], dims, table.dtype, axis=axis)


@operator("gather")
def gather_elements(graph: Graph, x: Value, dim: int, index: Value) -> Value:
    return graph.add("GatherElements", [x, index], index.dims, x.dtype, axis=dim % x.ndim)


@operator("index_select")
def index_select(graph: Graph, x: Value, dim: int, index: Value) -> Value:
    return gather(graph, x, index, dim % x.ndim)


@operator("index_copy")
def index_copy(graph: Graph, x: Value, dim: int, index: Value, source: Value) -> Value:
    at = dim % x.ndim
    for axis in range(source.ndim):
        if axis != at:
            index = unsqueeze(graph, index, axis)
    where = expand(graph, index, *source.dims)
    return graph.add("ScatterElements", [x, where, source], x.dims, x.dtype, axis=at)


@operator("embedding")
def embedding(graph: Graph, index: Value, table: Value, **_: Any) -> Value:
    return gather(graph, value_of(graph, table), index)


@operator("scatter_add")
def scatter_add(graph: Graph, x: Value, dim: int, index: Value, source: Value) -> Value:
    return graph.add(
        "ScatterElements", [x, index, source], x.dims, x.dtype, axis=dim % x.ndim, reduction="add"
    )


@operator("full_like", "ones_like")
def full_like(
    graph: Graph, x: Value, number: float = 1, *, dtype: torch.dtype | None = None
) -> Value:
    wanted = graph.constant(number, dtype or x.dtype)
    if wanted.known is not None and all(isinstance(size, int) for size in x.dims):
        return graph.constant(wanted.known.expand([int(size) for size in x.dims]))
    return graph.add("Expand", [wanted, graph.shape(x.dims)], x.dims, wanted.dtype)


@operator("zeros_like")
def zeros_like(graph: Graph, x: Value) -> Value:
    return full_like(graph, x, 0)


@operator("triu", "__triu__")
def triu(graph: Graph, x: Value, diagonal: int = 0) -> Value:
    return _triangle(graph, x, diagonal, upper=1)


@operator("tril")
def tril(graph: Graph, x: Value, diagonal: int = 0) -> Value:
    return _triangle(graph, x, diagonal, upper=0)


def _triangle(graph: Graph, x: Value, diagonal: int, upper: int) -> Value:
    inputs = [x, graph.constant(torch.tensor(diagonal, dtype=torch.int64))]
    return graph.add("Trilu", inputs, x.dims, x.dtype, upper=upper)
