"""Linear layers, read through prefix slots.

    linear(x, W, b)                  ->  tint.linear_forward(x, tint.prefix(W), tint.prefix(b))
    linear(x, t(W), b)               ->  the same with a transposed prefix read
    split(linear(x, W, b), widths)   ->  one tint.linear_forward a piece, each with its own rows of W and b
    linear(h, E) -> output           ->  tint.linear_forward(h, E): the head reads its table, not a prefix slot

q, k and v from one product become three layers: their updates differ, and value-only attention needs one.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.compiler.builder import Builder, logits_node, operands, short_label
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass
from tintc.passes.patterns import aten, calls, is_item, is_parameter, last_size


@graph_pass(requires=("well_formed", "one_logits_output"), ensures=("well_formed", "one_logits_output"))
def recognize_linear(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    head = logits_node(graph)
    for node in [n for n in graph.nodes if calls(n, aten.linear)]:
        x, weight, *rest = operands(node)
        bias = rest[0] if rest else None
        transpose = calls(weight, aten.t)
        matrix = weight.args[0] if transpose else weight
        if not is_parameter(matrix) or not (bias is None or is_parameter(bias)):
            info(node).refused = "its weight or bias is computed, not a parameter of the model"
            continue
        if node is head and not transpose:
            _replace_head(graph, node, x, matrix, bias)
        else:
            _replace(graph, node, x, matrix, bias, transpose)
    graph.eliminate_dead_code()
    return graph


def _replace_head(graph: fx.Graph, node: fx.Node, x: Any, weight: fx.Node, bias: Any) -> None:
    with graph.inserting_before(node):
        shape = ("B", "T", info(weight).shape[0])
        new = Builder(graph).call("linear_forward", x, weight, bias, like=node, label="logits", shape=shape)
    node.replace_all_uses_with(new)


def _replace(graph: fx.Graph, node: fx.Node, x: Any, weight: fx.Node, bias: Any, transpose: bool) -> None:
    build, label = Builder(graph), short_label(info(node).module)
    rows = info(weight).shape[1 if transpose else 0]
    assert isinstance(rows, int)
    for piece, start, stop in _pieces(node, rows):
        suffix = "" if (start, stop) == (0, rows) else f"_{start}_{stop}"
        with graph.inserting_before(node):
            w = read_slot(build, node, weight, start, stop, transpose)
            b = None if bias is None else read_slot(build, node, bias, start, stop, False)
            new = build.call("linear_forward", x, w, b, like=node, label=label + suffix, shape=("B", "T", stop - start))
        piece.replace_all_uses_with(new)


def read_slot(build: Builder, reader: fx.Node, parameter: fx.Node, start: int, stop: int, transpose: bool) -> fx.Node:
    """A `tint.prefix` read of some rows of a parameter; the slot is called after the parameter and the rows.

    A slot that several layers share is read once, where the first of them, `reader` or another, needs it.
    """
    name = info(parameter).parameter
    rows = info(parameter).shape[1 if transpose else 0]
    slot = name if (start, stop) == (0, rows) else f"{name}[{start}:{stop}]"
    shared = [n for n in parameter.users if info(n).slot == slot and n.args[3] is transpose]
    if shared:
        if reader < shared[0]:
            reader.prepend(shared[0])
        return shared[0]
    label = short_label(f"{name}" if slot == name else f"{name}_{start}_{stop}")
    return build.call("prefix", parameter, start, stop, transpose, label=label, slot=slot, module=(name or "").rpartition(".")[0])


def _pieces(node: fx.Node, rows: int) -> list[tuple[fx.Node, int, int]]:
    """(node that is read, first row, end row): the whole product, or the items of the one split that uses it."""
    users = list(node.users)
    if len(users) == 1 and calls(users[0], aten.split, aten.split_with_sizes, aten.chunk) and _splits_last(users[0]):
        items = sorted((u for u in users[0].users if is_item(u)), key=lambda u: u.args[1])  # type: ignore[arg-type,return-value]
        widths = [last_size(value) for value in items]
        if len(items) == len(users[0].users) and None not in widths and sum(widths) == rows:  # type: ignore[arg-type]
            stops = [sum(widths[: i + 1]) for i in range(len(widths))]  # type: ignore[arg-type]
            return [(item, stop - width, stop) for item, stop, width in zip(items, stops, widths, strict=True)]  # type: ignore[operator]
    return [(node, 0, rows)]


def _splits_last(split: fx.Node) -> bool:
    dimension = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    return dimension in (-1, 2)
