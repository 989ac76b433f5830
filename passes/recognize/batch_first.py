"""What does the same to every token does it to sequences first, where tokens came first.

    f(x_TBD)                    ->  transpose(f(transpose(x_TBD)))   f: a layer, a norm, x + y, relu
    transpose(transpose(x))     ->  x
    linear(view(x_TB..., [-1, D]))  ->  view(transpose(linear(transpose(view(x, [T, B, D])))))

torch's own attention has tokens first, and so has fairseq's whole stack. Part of `canonicalize`;
what is rearranged around attention is followed by the passes behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from tintc.ir.builder import input_node
from tintc.ir.node_meta import copy_info
from tintc.passes.analysis.patterns import VIEWS, aten, called_like, calls, last_size, sizes

_LAYERS = (aten.linear, aten.layer_norm, aten.rms_norm)  # the first operand has the tokens
_OVER_AXES = (aten.mean, aten.sum, aten.amax, aten.var, aten.std, aten.linalg_vector_norm)


def batch_first(graph: fx.Graph) -> None:
    """See the module's first lines."""
    ids = input_node(graph, "input_ids")
    batch, tokens = sizes(ids)
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        shape = sizes(node)
        if len(shape) == 3 and _same(shape[:2], (tokens, batch)):
            _turn(graph, node)
        elif calls(node, aten.linear) and len(shape) == 2 and calls(node.args[0], *VIEWS):
            source: Any = node.args[0].args[0]
            if _same(sizes(source)[:2], (tokens, batch)) and len(sizes(source)) > 2:
                _turn_merged(graph, node, source, (tokens, batch))
    for node in list(graph.nodes):
        if _swaps(node) and _swaps(before := node.args[0]):
            node.replace_all_uses_with(before.args[0])


def _same(found: Any, expected: Any) -> bool:
    return [str(size) for size in found] == [str(size) for size in expected]


def _swaps(node: Any) -> bool:
    """Whether it exchanges the first two of three axes."""
    if not isinstance(node, fx.Node) or len(sizes(node)) != 3:
        return False
    if calls(node, aten.permute):
        return list(node.args[1]) in ([1, 0, 2], [1, 0, -1])  # type: ignore[arg-type]
    axes = node.args[1:] if calls(node, aten.transpose) else ()
    return sorted(axis % 3 for axis in axes) == [0, 1]  # type: ignore[operator]


def _turn(graph: fx.Graph, node: fx.Node) -> None:
    wide = _operands_of_tokens(node)
    if not wide:
        return
    with graph.inserting_before(node):
        swapped = {x: called_like(node, aten.transpose.int, x, 0, 1) for x in wide}
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: swapped.get(n, n))
        new = graph.call_function(node.target, *arguments)  # type: ignore[arg-type]
        new.meta.update(node.meta)
        copy_info(node, new)
        new.meta["val"] = node.meta["val"].transpose(0, 1)
        back = called_like(node, aten.transpose.int, new, 0, 1)
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _operands_of_tokens(node: fx.Node) -> list[fx.Node]:
    """The operands that have tokens and sequences as their first axes, if the operator does the
    same to every token; else none.
    """
    if calls(node, *_LAYERS):
        return [node.all_input_nodes[0]]
    tags = node.target.tags if isinstance(node.target, OpOverload) else ()
    if calls(node, *_OVER_AXES):
        x, axes = node.args[0], next((a for a in node.args[1:] if isinstance(a, list)), None)
        own = isinstance(x, fx.Node) and len(sizes(x)) == 3 and axes in ([-1], [2])
        return [x] if own else []  # type: ignore[list-item]
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
        return []
    shapes = {x: sizes(x) for x in node.all_input_nodes}
    wide = [x for x, shape in shapes.items() if len(shape) == 3]
    return wide if all(len(shape) in (0, 1, 3) for shape in shapes.values()) else []


def _turn_merged(graph: fx.Graph, node: fx.Node, source: fx.Node, counts: tuple[Any, Any]) -> None:
    """A layer that reads tokens and sequences as one axis, a view of `source`."""
    x: Any = node.args[0]
    ids, width = input_node(graph, "input_ids"), last_size(node)
    with graph.inserting_before(node):
        lengths = [graph.call_function(aten.sym_size.int, (ids, axis)) for axis in (1, 0)]
        for length, size in zip(lengths, counts, strict=True):
            length.meta["val"] = size
        parted = called_like(node, aten.reshape.default, source, [*lengths, last_size(x)])
        turned = called_like(node, aten.transpose.int, parted, 0, 1)
        linear = graph.call_function(aten.linear.default, (turned, *node.args[1:]))
        linear.meta.update(node.meta)
        copy_info(node, linear)
        linear.meta["val"] = turned.meta["val"].new_empty((*sizes(turned)[:2], width))
        back = called_like(node, aten.transpose.int, linear, 0, 1)
        merged = called_like(node, aten.reshape.default, back, [-1, width])
    node.replace_all_uses_with(merged)
    graph.erase_node(node)
