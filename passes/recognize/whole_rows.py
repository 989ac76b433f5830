"""Rows that a mask or counts pick are computed with all the others.

    index_put(z, [m], f(x[m]))
      ->  where(m, f(x), z)
    cat(f_0(p_0), ..., f_n(p_n)), the p_i a split of x's rows by numbers that depend on data
      ->  f_i(x) in the rows of part i

How many rows there are would depend on the data, and an island has one form for all. Safe because
every operator of an f works row by row, and rows that nobody picked are dropped again: forward
`where` does it, backward they get no gradient. Part of `canonicalize`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tintc.ir.node_meta import copy_info
from tintc.passes.analysis.patterns import aten, called_like, calls, number, sizes, with_defaults

# Of finite numbers they and their gradients are finite: a row that nobody picked must not spoil
# others by 0 * inf.
_ELEMENTWISE = (
    *(aten.add, aten.sub, aten.mul, aten.neg, aten.square, aten.tanh, aten.sigmoid, aten.relu),
    *(aten.gelu, aten.silu, aten.elu, aten.leaky_relu, aten.mish, aten.hardswish, aten.clamp),
    *(aten.to, aten._to_copy, aten.alias, aten.clone, aten.contiguous, aten.type_as),
)
_ALONG = (aten.softmax, aten.split, aten.chunk, aten.slice, aten.unsqueeze)  # (x, axis or so)


@dataclass(frozen=True)
class _Rows:
    """Some rows of `source`. by: which: the mask of them, or the split and the number of the
    part.
    """

    source: fx.Node
    by: Any


def whole_rows(graph: fx.Graph) -> None:
    """See the module's first lines. What reads picked rows in another way is left alone."""
    if not any(_picked(node) for node in graph.nodes):
        return
    graph.eliminate_dead_code()
    picked = {node: rows for node in graph.nodes if (rows := _picked(node)) is not None}
    some: dict[fx.Node, Any] = {node: rows.by for node, rows in picked.items()}
    for node in graph.nodes:
        if node not in some and (by := _row_by_row(node, some)) is not None:
            some[node] = by
    bad = {
        _group(some[node])
        for node in some
        for user in node.users
        if user in picked or not _follows(user, some)
    }
    makes = _Whole(graph, picked, {n: by for n, by in some.items() if _group(by) not in bad})
    for node in list(graph.nodes):
        makes.node(node)
    _drop_counts(graph)


def _group(by: Any) -> Any:
    """What is rewritten together: all parts of a split."""
    return by[0] if isinstance(by, tuple) else by


def _picked(node: fx.Node) -> _Rows | None:
    args: Any = node.args
    if calls(node, aten.index) and len(args[1]) == 1:
        x, (mask,) = args
        if isinstance(mask, fx.Node) and _is_mask(mask):
            return _Rows(x, mask)
    if calls(node, operator.getitem):
        split, part = args
        if calls(split, aten.split_with_sizes) and _counts(split) is not None:
            return _Rows(split.args[0], (split, part))
    return None


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _counts(split: fx.Node) -> list[Any] | None:
    """The number of rows of every part, as tensors without axes or plain numbers; None where no
    data decides them.
    """
    _, counts, axis = with_defaults(split.args, None, None, 0)
    read = [calls(count, aten.item) for count in counts]
    if axis != 0 or not any(read):
        return None
    if not all(of_data or isinstance(n, int) for n, of_data in zip(counts, read, strict=True)):
        return None
    return [n.args[0] if of_data else n for n, of_data in zip(counts, read, strict=True)]


def _follows(user: fx.Node, some: dict[fx.Node, Any]) -> bool:
    """Whether a reader of picked rows can read all of them."""
    if user in some or _puts(user, some) is not None or _joins(user, some) is not None:
        return True
    return calls(user, aten.sym_size) and not user.users


def _row_by_row(node: fx.Node, some: dict[fx.Node, Any]) -> Any:
    """Which rows the node's are, if it gives one for every row that it reads."""
    read = [n for n in node.all_input_nodes if n in some]
    if len({some[n] for n in read}) != 1:
        return None
    args: Any = node.args
    first, by = args[0], some[read[0]]
    if calls(node, *_ELEMENTWISE) or (calls(node, aten.div) and number(node.args[1])):
        others = [n for n in node.all_input_nodes if n not in some]
        ranks = [len(sizes(n)) for n in others]
        same = all(len(sizes(n)) == len(sizes(node)) for n in read)
        return by if same and all(rank < len(sizes(node)) for rank in ranks) else None
    if read != [first] or any(n in some for n in node.all_input_nodes[1:]):
        return None
    if calls(node, aten.linear) and len(sizes(first)) > 1:
        return by
    if calls(node, aten.matmul, aten.mm):
        fits = len(sizes(first)) > 1 and len(sizes(args[1])) == 2
        return by if fits else None
    if calls(node, aten.layer_norm, aten.rms_norm):
        return by if len(args[1]) < len(sizes(first)) else None
    if calls(node, *_ALONG):
        return by if _axis(node) is not None else None
    of_columns = calls(node, operator.getitem) and calls(first, aten.split, aten.chunk)
    return by if of_columns else None


def _axis(node: fx.Node) -> tuple[int, int] | None:
    """(which argument is the axis, the axis counted from the last one) of an operator that leaves
    the rows alone; None for others.
    """
    args: Any = node.args
    at = 2 if calls(node, aten.split, aten.chunk) else 1
    rank = len(sizes(args[0])) + calls(node, aten.unsqueeze)
    axis = args[at] if len(args) > at else 0
    if not isinstance(axis, int) or axis % rank == 0:
        return None
    return at, axis % rank - rank


def _puts(node: fx.Node, some: dict[fx.Node, Any]) -> fx.Node | None:
    """The rows that are put where a mask had picked them."""
    args: Any = node.args
    if not calls(node, aten.index_put) or (len(args) > 3 and args[3]):
        return None
    z, places, value = args[:3]
    if z in some or len(places) != 1 or value not in some or some[value] is not places[0]:
        return None
    axes = len(sizes(value)) - 1 + len(sizes(places[0]))
    return value if axes == len(sizes(z)) else None


def _joins(node: fx.Node, some: dict[fx.Node, Any]) -> fx.Node | None:
    """The split whose parts are joined again, all of them in order."""
    args: Any = node.args
    if not calls(node, aten.cat) or (len(args) > 1 and args[1] != 0):
        return None
    parts = [some.get(part) for part in args[0]]
    split: Any = parts[0][0] if isinstance(parts[0], tuple) else None
    if split is None or parts != [(split, i) for i in range(len(split.args[1]))]:
        return None
    return split  # type: ignore[no-any-return]


class _Whole:
    """Writes the operators anew for all rows. some: nodes of which that is done -> which rows."""

    def __init__(
        self, graph: fx.Graph, picked: dict[fx.Node, _Rows], some: dict[fx.Node, Any]
    ) -> None:
        self.graph, self.picked, self.some = graph, picked, some
        self.whole: dict[fx.Node, fx.Node] = {}

    def node(self, node: fx.Node) -> None:
        with self.graph.inserting_before(node):
            if node in self.picked and node in self.some:
                source = self.picked[node].source
                self.whole[node] = self.whole.get(source, source)
            elif node in self.some:
                self.whole[node] = self._again(node)
            elif (value := _puts(node, self.some)) is not None:
                node.replace_all_uses_with(self._where(node, self.whole[value]))
            elif (split := _joins(node, self.some)) is not None:
                node.replace_all_uses_with(self._joined(node, split))

    def _again(self, node: fx.Node) -> fx.Node:
        args = list(node.args)
        if calls(node, *_ALONG):
            at, axis = _axis(node) or (1, -1)
            args[at:] = [axis, *args[at + 1 :]]
        args = list(fx.node.map_arg(tuple(args), lambda n: self.whole.get(n, n)))
        return called_like(node, node.target, *args, **node.kwargs)

    def _where(self, node: fx.Node, value: fx.Node) -> fx.Node:
        args: Any = node.args
        z, (mask,) = args[:2]
        return called_like(node, aten.where.self, self._beside(node, mask), value, z)

    def _beside(self, node: fx.Node, mask: fx.Node) -> fx.Node:
        for _ in range(len(sizes(node)) - len(sizes(mask))):
            mask = called_like(node, aten.unsqueeze.default, mask, -1)
        return mask

    def _joined(self, node: fx.Node, split: fx.Node) -> fx.Node:
        args: Any = node.args
        *parts, found = (self.whole[part] for part in args[0])
        place = self._places(node, split.args[0])
        ends: list[fx.Node] = []
        for count in (_counts(split) or [])[:-1]:
            ends.append(called_like(node, aten.add.Tensor, ends[-1], count) if ends else count)
        for part, end in zip(parts[::-1], ends[::-1], strict=True):
            before = called_like(node, aten.lt.Tensor, place, end)
            found = called_like(node, aten.where.self, self._beside(node, before), part, found)
        return found

    def _places(self, like: fx.Node, source: Any) -> fx.Node:
        """0, 1, ... for every row."""
        value = source.meta["val"]
        rows = self.graph.call_function(aten.sym_size.int, (source, 0))
        rows.meta["val"] = value.shape[0]
        places = self.graph.call_function(aten.arange.default, (rows,), {"device": value.device})
        places.meta["val"] = value.new_empty(value.shape[:1], dtype=torch.int64)
        for new in (rows, places):
            copy_info(like, new)
        return places


def _drop_counts(graph: fx.Graph) -> None:
    """Numbers that were read from data and that nobody needs now: torch keeps them otherwise."""
    graph.eliminate_dead_code()
    for node in reversed(list(graph.nodes)):
        if calls(node, aten.item) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
