"""Sums and products of two activations: residual connections and gates.

add(x, y)  ->  tint.residual(x, y)        where both are (B, T, D)
mul(x, y)  ->  tint.multiply(x, y)
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, short_label
from tintc.ir.context import Context
from tintc.ir.dialect import tint_name
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.patterns import aten, calls


@graph_pass(requires=("well_formed",), ensures=("well_formed",))
def recognize_arithmetic(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. In topological order, so that a sum of products is recognised
    too.
    """
    build = Builder(graph)
    for node in list(graph.nodes):
        name = (
            "residual"
            if calls(node, aten.add, aten.add_)
            else "multiply"
            if calls(node, aten.mul, aten.mul_)
            else None
        )
        if name is None or len(node.args) != 2 or node.kwargs:
            continue
        x, y = node.args
        activations = [isinstance(a, fx.Node) and tint_name(a) is not None for a in (x, y)]
        if not all(activations) or info(x).shape != info(y).shape:
            # What is left of the arithmetic of masks and positions goes with the operators that
            # read it.
            verb = "add" if name == "residual" else "multiply"
            info(node).refused = info(node).refused or (
                f"it does not {verb} two activations of equal shape" if any(activations) else ""
            )
            continue
        with graph.inserting_before(node):
            new = build.call(
                name, x, y, like=node, label=f"{short_label(info(node).module)}_{name}"
            )
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    return graph
