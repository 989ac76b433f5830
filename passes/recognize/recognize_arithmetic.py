"""Sums and products of two activations: residual connections and gates.

add(x, y)  ->  tint.residual(x, y)        where both are (B, T, D)
mul(x, y)  ->  tint.multiply(x, y)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from tintc.ir.builder import Builder, short_label
from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, tint_name
from tintc.ir.node_meta import info
from tintc.ir.ops import elementwise
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.patterns import aten, calls


class Spelling(NamedTuple):
    """An operator, what it does to its operands in a message, and the torch operators that it
    replaces.
    """

    operator: AnyOperator
    verb: str
    replaced: tuple[Any, ...]


SPELLINGS = (
    Spelling(elementwise.residual, "add", (aten.add, aten.add_)),
    Spelling(elementwise.multiply, "multiply", (aten.mul, aten.mul_)),
)


@graph_pass(requires=("well_formed",), ensures=("well_formed",))
def recognize_arithmetic(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. In topological order, so that a sum of products is recognised
    too.
    """
    build = Builder(graph)
    for node in list(graph.nodes):
        spelling = next((s for s in SPELLINGS if calls(node, *s.replaced)), None)
        if spelling is None or len(node.args) != 2 or node.kwargs:
            continue
        x, y = node.args
        activations = [isinstance(a, fx.Node) and tint_name(a) is not None for a in (x, y)]
        if not all(activations) or info(x).shape != info(y).shape:
            # What is left of the arithmetic of masks and positions goes with the operators that
            # read it.
            info(node).refused = info(node).refused or (
                f"it does not {spelling.verb} two activations of equal shape"
                if any(activations)
                else ""
            )
            continue
        with graph.inserting_before(node):
            label = f"{short_label(info(node).module)}_{spelling.operator.name}"
            new = build.call(spelling.operator, x, y, like=node, label=label)
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    return graph
