"""Appends the gradient-descent updates of every trained slot that a gradient reaches.

    y = linear_forward(x, W, b), gradient dy
      ->  W' = linear_descent(W, dy, x, inner_lr); b' = bias_descent(b, dy, inner_lr)
    y = norm_forward(x, gamma, beta), dy
      ->  beta' = bias_descent(beta, ...); gamma' = norm_descent(gamma, dy, x, ...)

A descent returns a new value of its slot. All use the weights from before the step. The graph's
output `updates` maps each slot to its newest value.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.builder import Builder, input_node, outputs
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass


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
        for node in [n for n in graph.nodes if info(n).gradient is not None]:
            dy = info(node).gradient
            for operator, slot, args in _updates(node, dy, inner_lr):
                name = info(slot).slot
                assert name is not None
                label = f"{slot.name}_updated"
                value = newest.get(name, slot)
                newest[name] = build.call(
                    operator,
                    value,
                    *args,
                    like=node,
                    label=label,
                    slot=name,
                    phase="descent",
                    step=0,
                )
            info(node).gradient = None
    output.args = ({**outputs(graph), "updates": newest},)  # type: ignore[dict-item]
    return graph


def _updates(
    node: fx.Node, dy: Any, inner_lr: fx.Node
) -> list[tuple[str, fx.Node, tuple[Any, ...]]]:
    """(descent operator, prefix read, arguments after the slot) of each trained slot of a forward
    node.
    """
    if is_tint(node, "linear_forward"):
        found = [
            ("linear_descent", argument(node, "weight"), (dy, argument(node, "x"), inner_lr)),
            ("bias_descent", argument(node, "bias"), (dy, inner_lr)),
        ]
    elif is_tint(node, "norm_forward"):
        x, eps, kind, heads = (argument(node, name) for name in ("x", "eps", "kind", "heads"))
        found = [
            ("norm_descent", argument(node, "gamma"), (dy, x, eps, kind, heads, inner_lr)),
            ("bias_descent", argument(node, "beta"), (dy, inner_lr)),
        ]
    else:
        found = []
    return [update for update in found if update[1] is not None and info(update[1]).trainable]
