"""Appends the gradient-descent updates of every trained slot that a gradient reaches.

    y = linear_forward(x, W, b), gradient dy  ->  W' = linear_descent(W, dy, x, inner_lr), ...

A descent returns a new value of its slot. All use the weights from before the step. The rules stand
in `descent_rules.py`. The graph's output `updates` maps each slot to its newest value.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, input_node, outputs
from tintc.ir.context import Context
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass
from tintc.passes.train.descent_rules import descent_rule

RULES = descent_rule.complete()


@graph_pass(
    requires=("named_outputs", "phases_in_order"),
    ensures=("named_outputs", "phases_in_order", "no_gradients_left"),
)
def build_descent(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Of a slot that several layers share, the updates add up."""
    output = graph.output_node()
    inner_lr = input_node(graph, "inner_lr")
    newest: dict[str, fx.Node] = {}
    with graph.inserting_before(output):
        build = Builder(graph)
        for node in list(graph.nodes):
            dy, rule = info(node).gradient, RULES.of(node)
            info(node).gradient = None
            for operator, slot, args in rule(node, dy, inner_lr) if dy and rule else ():
                if slot is None or not info(slot).trainable:
                    continue
                name = info(slot).slot
                assert name is not None
                newest[name] = build.call(
                    operator,
                    newest.get(name, slot),
                    *args,
                    like=node,
                    label=f"{slot.name}_updated",
                    slot=name,
                    phase="descent",
                    step=0,
                )
    output.args = ({**outputs(graph), "updates": newest},)  # type: ignore[dict-item]
    return graph
