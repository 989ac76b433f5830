"""Linear layers, read through prefix slots.

    linear(x, W, b)
      ->  tint.linear_forward(x, tint.prefix(W), tint.prefix(b))
    linear(x, t(W), b)
      ->  the same with a transposed prefix read
    some columns of linear(x, W, b)
      ->  tint.linear_forward of these rows of W and b alone
    linear(h, E) -> multiples -> output
      ->  tint.linear_forward(h, E): the head reads its table, not a prefix slot

q, k and v from one product become three layers, gate and up-projection two: their updates differ,
and value-only attention needs one.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.builder import Builder, operands, short_label
from tintc.ir.context import Context
from tintc.ir.layout import Rows
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.coordinates import Untraceable, is_rearrangement
from tintc.passes.analysis.heads import read_columns
from tintc.passes.analysis.last_layer import last_layer
from tintc.passes.analysis.patterns import aten, calls, is_parameter, is_whole, last_size, sizes
from tintc.passes.analysis.slots import read_slot, take_rows


@graph_pass(
    requires=("well_formed", "one_logits_output"),
    ensures=("well_formed", "one_logits_output"),
    reads=("max_positions", "max_tokens"),
)
def recognize_linear(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    head = last_layer(graph)
    for node in [n for n in graph.nodes if calls(n, aten.linear)]:
        x, weight, *rest = operands(node)
        bias = rest[0] if rest else None
        transpose = calls(weight, aten.t)
        matrix = weight.args[0] if transpose else weight
        if not is_parameter(matrix) or not (bias is None or is_parameter(bias)):
            info(node).refused = "its weight or bias is computed, not a parameter of the model"
        elif last_size(node) is None or len(sizes(node)) != 3:
            info(
                node
            ).refused = f"its result has {len(sizes(node))} axes; expected (batch, tokens, width)"
        elif not is_whole(node):
            info(node).refused = "its result has a part of the tokens; expected all of them"
        elif node is head and not transpose:
            _replace_head(graph, node, x, matrix, bias)
        else:
            _replace(graph, node, x, matrix, bias, transpose)
    _take_columns(graph, context)
    graph.eliminate_dead_code()
    return graph


def _replace_head(graph: fx.Graph, node: fx.Node, x: Any, weight: fx.Node, bias: Any) -> None:
    with graph.inserting_before(node):
        shape = ("B", "T", info(weight).shape[0])
        new = Builder(graph).call(
            linear_forward, x, weight, bias, like=node, label="logits", shape=shape
        )
    node.replace_all_uses_with(new)


def _replace(
    graph: fx.Graph, node: fx.Node, x: Any, weight: fx.Node, bias: Any, transpose: bool
) -> None:
    build, rows = Builder(graph), info(weight).shape[1 if transpose else 0]
    assert isinstance(rows, int)
    with graph.inserting_before(node):
        w = read_slot(build, node, weight, Rows(0, rows, rows), transpose)
        b = None if bias is None else read_slot(build, node, bias, Rows(0, rows, rows), False)
        shape = ("B", "T", rows)
        new = build.call(
            linear_forward, x, w, b, like=node, label=short_label(info(node).module), shape=shape
        )
    node.replace_all_uses_with(new)


def _take_columns(graph: fx.Graph, context: Context) -> None:
    """Parts of a product that are (batch, tokens, width) themselves; attention takes those that are
    heads.
    """
    build = Builder(graph)
    for node in [
        n
        for n in graph.nodes
        if is_rearrangement(n) and len(sizes(n)) == 3 and last_size(n) is not None
    ]:
        try:
            root, rows = read_columns(node, context)
            new = take_rows(build, root, rows)
        except Untraceable:
            continue
        node.replace_all_uses_with(new)
