"""Layers that read tokens first and sequences second read them the other way around.

    linear(x_TBD)                 ->  transpose(linear(transpose(x_TBD)))
    linear(view(x_TB..., [-1, D]))  ->  view(transpose(linear(transpose(view(x, [T, B, D])))))

torch's own attention works so. Safe because a layer does the same to every token. Part of
`canonicalize`; what is rearranged around a layer is followed by the passes behind it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.builder import input_node
from tintc.ir.node_meta import copy_info
from tintc.passes.analysis.patterns import VIEWS, aten, calls, last_size, sizes


def batch_first(graph: fx.Graph) -> None:
    """See the module's first lines."""
    ids = input_node(graph, "input_ids")
    batch, tokens = sizes(ids)
    for node in [n for n in graph.nodes if calls(n, aten.linear)]:
        shape, x = sizes(node), node.args[0]
        if not isinstance(x, fx.Node):
            continue
        if len(shape) == 3 and _same(shape[:2], (tokens, batch)):
            _turn(graph, node, x, None)
        elif len(shape) == 2 and calls(x, *VIEWS):
            source: Any = x.args[0]
            if _same(sizes(source)[:2], (tokens, batch)) and len(sizes(source)) > 2:
                _turn(graph, node, x, (source, tokens, batch))


def _same(found: Any, expected: Any) -> bool:
    return [str(size) for size in found] == [str(size) for size in expected]


def _turn(
    graph: fx.Graph, node: fx.Node, x: fx.Node, merged: tuple[fx.Node, Any, Any] | None
) -> None:
    """merged: (what x is a view of, its tokens, its sequences); None where x has both axes."""

    def call(target: Any, source: fx.Node, *args: Any) -> fx.Node:
        new = graph.call_function(target, (source, *args))
        new.meta.update(node.meta)
        new.meta["val"] = target(source.meta["val"], *_values(args))
        copy_info(node, new)
        return new

    with graph.inserting_before(node):
        if merged is not None:
            source, tokens, batch = merged
            ids = input_node(graph, "input_ids")
            counts = [graph.call_function(aten.sym_size.int, (ids, axis)) for axis in (1, 0)]
            for count, size in zip(counts, (tokens, batch), strict=True):
                count.meta["val"] = size
            x = call(aten.reshape.default, source, [*counts, last_size(x)])
        turned = call(aten.transpose.int, x, 0, 1)
        linear = graph.call_function(aten.linear.default, (turned, *node.args[1:]))
        linear.meta.update(node.meta)
        copy_info(node, linear)
        width = last_size(node)
        linear.meta["val"] = turned.meta["val"].new_empty((*sizes(turned)[:2], width))
        back = call(aten.transpose.int, linear, 0, 1)
        if merged is not None:
            back = call(aten.reshape.default, back, [-1, width])
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _values(arguments: tuple[Any, ...]) -> Any:
    return fx.node.map_arg(arguments, lambda node: node.meta["val"])
