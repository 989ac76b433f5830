"""Elementwise activations, as one operator or written out.

relu(x); gelu(x, approximate=...); silu(x); tanh(x)                          ->  tint.activation_forward(x, kind)
0.5 x * (tanh(sqrt(2/pi) * (x + 0.044715 x^3)) + 1)                          ->  tint.activation_forward(x, "gelu_tanh")
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from tintc.compiler.builder import Builder, short_label
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass
from tintc.passes.patterns import aten, binary, calls, last_size, number


@graph_pass(requires=("well_formed",), ensures=("well_formed",))
def recognize_activation(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Written-out forms first: they contain a tanh of their own."""
    for match in (_written_out_gelu, _one_operator):
        for node in list(graph.nodes):
            found = match(node)
            if found is None:
                continue
            x, kind = found
            with graph.inserting_before(node):
                shape = ("B", "T", last_size(node))
                label = f"{short_label(info(node).module)}_{kind}"
                new = Builder(graph).call("activation_forward", x, kind, like=node, label=label, shape=shape)
            node.replace_all_uses_with(new)
        graph.eliminate_dead_code()
    return graph


def _one_operator(node: fx.Node) -> tuple[fx.Node, str] | None:
    x: Any = node.args[0] if node.args else None
    if last_size(node) is None:
        return None
    if calls(node, aten.relu, aten.relu_):
        return x, "relu"
    if calls(node, aten.gelu):
        return x, "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if calls(node, aten.silu, aten.silu_):
        return x, "silu"
    return (x, "tanh") if calls(node, aten.tanh) else None


def _written_out_gelu(node: fx.Node) -> tuple[fx.Node, str] | None:
    for half, rest in binary(node, aten.mul):
        x = _scaled(half, 0.5)
        inner = next((a for a, one in binary(rest, aten.add) if number(one) == 1 and calls(a, aten.tanh)), None)
        if x is None or inner is None:
            continue
        argument = _scaled(inner.args[0], math.sqrt(2 / math.pi))
        for linear, cubic in binary(argument, aten.add):
            power = _scaled(cubic, 0.044715)
            if linear is x and calls(power, aten.pow) and power.args[0] is x and number(power.args[1]) == 3:
                return x, "gelu_tanh"
    return None


def _scaled(node: Any, factor: float) -> Any:
    """x where the node is x * factor, else None."""
    for x, scale in binary(node, aten.mul):
        value = number(scale)
        if value is not None and math.isclose(value, factor, rel_tol=1e-6):
            return x
    return None
