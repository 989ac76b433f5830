"""Linear layers, read through prefix slots.

    linear(x, W, b)                        ->  tint.linear_forward(x, tint.prefix(W), tint.prefix(b))
    linear(x, t(W), b)                     ->  the same with a transposed prefix read
    some columns of linear(x, W, b)        ->  tint.linear_forward of these rows of W and b alone
    linear(h, E) -> multiples -> output    ->  tint.linear_forward(h, E): the head reads its table, not a prefix slot

q, k and v from one product become three layers, gate and up-projection two: their updates differ, and value-only attention needs one.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.compiler.builder import Builder, logits_node, operands, short_label
from tintc.compiler.dialect import argument, is_tint, tint_name
from tintc.compiler.layout import Rows
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass
from tintc.passes.coordinates import Untraceable, is_rearrangement
from tintc.passes.heads import read_columns
from tintc.passes.patterns import aten, calls, is_parameter, last_size, sizes


@graph_pass(requires=("well_formed", "one_logits_output"), ensures=("well_formed", "one_logits_output"))
def recognize_linear(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    head = _head(graph)
    for node in [n for n in graph.nodes if calls(n, aten.linear)]:
        x, weight, *rest = operands(node)
        bias = rest[0] if rest else None
        transpose = calls(weight, aten.t)
        matrix = weight.args[0] if transpose else weight
        if not is_parameter(matrix) or not (bias is None or is_parameter(bias)):
            info(node).refused = "its weight or bias is computed, not a parameter of the model"
        elif last_size(node) is None or len(sizes(node)) != 3:
            info(node).refused = f"its result has {len(sizes(node))} axes; expected (batch, tokens, width)"
        elif node is head and not transpose:
            _replace_head(graph, node, x, matrix, bias)
        else:
            _replace(graph, node, x, matrix, bias, transpose)
    _take_columns(graph, context)
    graph.eliminate_dead_code()
    return graph


def _head(graph: fx.Graph) -> fx.Node:
    """The last layer: what the output reads, through multiples and a soft-cap if need be."""
    node = logits_node(graph)
    while is_tint(node, "scale", "activation_forward"):
        node = argument(node, "x")
    return node


def _replace_head(graph: fx.Graph, node: fx.Node, x: Any, weight: fx.Node, bias: Any) -> None:
    with graph.inserting_before(node):
        shape = ("B", "T", info(weight).shape[0])
        new = Builder(graph).call("linear_forward", x, weight, bias, like=node, label="logits", shape=shape)
    node.replace_all_uses_with(new)


def _replace(graph: fx.Graph, node: fx.Node, x: Any, weight: fx.Node, bias: Any, transpose: bool) -> None:
    build, rows = Builder(graph), info(weight).shape[1 if transpose else 0]
    assert isinstance(rows, int)
    with graph.inserting_before(node):
        w = read_slot(build, node, weight, Rows(0, rows, rows), transpose)
        b = None if bias is None else read_slot(build, node, bias, Rows(0, rows, rows), False)
        shape = ("B", "T", rows)
        new = build.call("linear_forward", x, w, b, like=node, label=short_label(info(node).module), shape=shape)
    node.replace_all_uses_with(new)


def _take_columns(graph: fx.Graph, context: Context) -> None:
    """Parts of a product that are (batch, tokens, width) themselves; attention takes those that are heads."""
    build = Builder(graph)
    for node in [n for n in graph.nodes if is_rearrangement(n) and len(sizes(n)) == 3 and last_size(n) is not None]:
        try:
            root, rows = read_columns(node, context)
            new = take_rows(build, root, rows)
        except Untraceable:
            continue
        node.replace_all_uses_with(new)


def take_rows(build: Builder, root: fx.Node, rows: Rows) -> fx.Node:
    """The coordinates `rows` of an activation: itself, or a layer with these rows of its weight and bias.

    Raises Untraceable where there is no layer to take them from.
    """
    if tint_name(root) is None:
        raise Untraceable(f"it reads {root.target}, which was not recognised")
    if (rows.start, rows.stop) == (0, info(root).shape[-1]):
        return root
    weight, bias = (argument(root, name) for name in ("weight", "bias")) if is_tint(root, "linear_forward") else (None, None)
    if weight is None or not is_tint(weight, "prefix"):
        raise Untraceable(f"it reads a part of {root.name}; expected parts of linear layers only")
    rows = _within(Rows(*(argument(weight, name) for name in ("start", "stop", "period"))), rows, info(root).shape[-1])
    parameters = [None if read is None else argument(read, "parameter") for read in (weight, bias)]
    with build.graph.inserting_before(root):
        w = read_slot(build, root, parameters[0], rows, argument(weight, "transpose"))  # type: ignore[arg-type]
        b = None if parameters[1] is None else read_slot(build, root, parameters[1], rows, False)
        x = argument(root, "x")
        for user in x.users:
            if is_tint(user, "linear_forward") and argument(user, "weight") is w and argument(user, "bias") is b:
                taken: fx.Node = user
                return taken
        label = f"{root.name}_{rows.start}_{rows.stop}"
        return build.call("linear_forward", x, w, b, like=root, label=label, shape=("B", "T", info(w).shape[0]))


def _within(whole: Rows, part: Rows, size: Any) -> Rows:
    """The rows of a parameter that are the rows `part` of a layer which reads its rows `whole`, `size` in number."""
    if (whole.start, whole.stop) == (0, whole.period):
        return part
    if part.period != size or whole.stop - whole.start != size:
        raise Untraceable("it reads a part that repeats of a part of a layer")
    return Rows(whole.start + part.start, whole.start + part.stop, whole.period)


def read_slot(build: Builder, reader: fx.Node, parameter: fx.Node, rows: Rows, transpose: bool) -> fx.Node:
    """A `tint.prefix` read of some rows of a parameter; the slot is called after the parameter and the rows.

    A slot that several layers share is read once, where the first of them, `reader` or another, needs it.
    """
    name = info(parameter).parameter or ""
    total = info(parameter).shape[1 if transpose else 0]
    assert isinstance(total, int)
    slot = rows.label(name, total)
    shared = [n for n in parameter.users if info(n).slot == slot and argument(n, "transpose") is transpose]
    if shared:
        if reader < shared[0]:
            reader.prepend(shared[0])
        return shared[0]
    label = short_label(name if slot == name else f"{name}_{rows.start}_{rows.stop}")
    where = (rows.start, rows.stop, rows.period, transpose)
    return build.call("prefix", parameter, *where, label=label, slot=slot, module=name.rpartition(".")[0])
