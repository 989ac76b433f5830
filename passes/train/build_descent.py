"""Appends the step of the inner rule for every trained slot that a gradient reaches.

    y = linear_forward(x, W, b), gradient dy  ->  W' = linear_descent(W, dy, x, inner_lr), ...

A descent returns a new value of its slot. All use the weights from before the step. What descends a
slot stands in `descent_rules.py`, how far and by which rule in `inner_rule.py`. The graph's outputs
`updates` and `states` map each slot to its newest value.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import fx

from tintc.ir.builder import outputs
from tintc.ir.context import Context
from tintc.ir.dialect import argument
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass
from tintc.passes.train.descent_rules import descent_rule
from tintc.passes.train.inner_rule import InnerRule, Trained

RULES = descent_rule.complete()


@graph_pass(
    requires=("named_outputs", "phases_in_order"),
    ensures=("named_outputs", "phases_in_order", "no_gradients_left"),
)
def build_descent(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Of a slot that several layers share, the updates add up."""
    output = graph.output_node()
    with graph.inserting_before(output):
        rule = InnerRule(graph, context.config)
        newest = rule.updated(_trained(graph, context))
    states = {"states": rule.states} if rule.states else {}
    output.args = ({**outputs(graph), "updates": newest, **states},)  # type: ignore[dict-item]
    return graph


def _trained(graph: fx.Graph, context: Context) -> list[Trained]:
    """The slots that a gradient reaches, in the order of the layers that read them."""
    found: dict[str, Trained] = {}
    for node in graph.nodes:
        dy, rule = info(node).gradient, RULES.of(node)
        info(node).gradient = None
        for update in rule(node, dy) if dy and rule else ():
            slot = update.slot
            if slot is None or not info(slot).trainable:
                continue
            name = info(slot).slot
            assert name is not None
            trained = found.setdefault(name, Trained(name, slot, _factor(slot, context)))
            trained.updates.append((update, node))
    return list(found.values())


def _factor(slot: fx.Node, context: Context) -> float:
    """Of the learning rate; the last pattern that matches wins."""
    name = info(argument(slot, "parameter")).parameter or ""
    found = [factor for pattern, factor in context.config.lr_scale if fnmatchcase(name, pattern)]
    return found[-1] if found else 1.0
