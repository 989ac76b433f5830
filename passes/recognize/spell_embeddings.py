"""Spells reads of tables one way, as torch.nn.Embedding does.

W[ids]; W.index_select(0, ids.flatten()).view(B, T, D); one_hot(ids) @ W
  ->  embedding(W, ids)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.builder import operands
from tintc.ir.node_meta import copy_info
from tintc.passes.analysis.evaluation import is_positional
from tintc.passes.analysis.patterns import VIEWS, aten, calls, is_parameter, last_size, sizes

_MERGED = (*VIEWS, aten.flatten, aten.ravel)


def spell_embeddings(graph: fx.Graph) -> None:
    """See the module's first lines. Of tables that are parameters of two axes; a part of
    `canonicalize`.
    """
    for node in list(graph.nodes):
        found = _read(node)
        if found is not None:
            with graph.inserting_before(node):
                new = graph.call_function(aten.embedding.default, found)
            new.meta.update(node.meta)
            copy_info(node, new)
            node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _read(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(table, index) where the node is rows of a table."""
    if node.op != "call_function":
        return None
    args = operands(node)
    if calls(node, aten.index) and len(args) == 2:
        first, *rest = args[1]
        return _pair(args[0], first) if all(axis is None for axis in rest) else None
    if calls(node, *VIEWS) and calls(args[0], aten.index_select):
        return _of_merged(node, *operands(args[0]))
    if calls(node, aten.matmul, aten.mm) and calls(hot := _uncast(args[0]), aten.one_hot):
        ids, count = operands(hot)
        return _pair(args[1], ids) if sizes(args[1])[:1] == (count,) else None
    return None


def _of_merged(node: fx.Node, table: Any, axis: Any, index: Any) -> tuple[fx.Node, fx.Node] | None:
    """Rows by merged ids, taken apart again."""
    if axis != 0 or not calls(index, *_MERGED) or last_size(node) != last_size(table):
        return None
    ids = operands(index)[0]
    apart = [str(size) for size in sizes(node)[:-1]]
    return _pair(table, ids) if apart == [str(size) for size in sizes(ids)] else None


def _uncast(node: Any) -> Any:
    return node.args[0] if calls(node, aten.to, aten._to_copy) else node


def _pair(table: Any, index: Any) -> tuple[fx.Node, fx.Node] | None:
    if not is_parameter(table) or len(sizes(table)) != 2 or not isinstance(index, fx.Node):
        return None
    whole = not index.meta["val"].is_floating_point() and "bool" not in str(index.meta["val"].dtype)
    of_ids = whole and not is_positional(index)  # positions: recognize_embedding
    return (table, index) if of_ids else None
