"""Appends the step of the inner rule for every trained slot that a gradient reaches.

    y = linear_forward(x, W, b), gradient dy  ->  W' = linear_descent(W, dy, x, inner_lr), ...

A descent returns a new value of its slot. All use the weights from before the step. What descends a
slot stands in `descent_rules.py`, how far and by which rule in `inner_rule.py`. The graph's outputs
`updates` and `states` map each slot to its newest value.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import outputs
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward
from tintc.ir.pass_manager import graph_pass
from tintc.ir.selection import Selection
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
    selection, head = Selection(context.config, context.aliases), _of_head(graph)
    for node in graph.nodes:
        dy, rule = info(node).gradient, RULES.of(node)
        info(node).gradient = None
        for update in rule(node, dy) if dy and rule else ():
            slot = update.slot
            if slot is None or not info(slot).trainable:
                continue
            name = info(slot).slot
            assert name is not None
            if name not in found:
                parameter = info(argument(slot, "parameter")).parameter or ""
                found[name] = Trained(name, slot, selection.factor(parameter))
            found[name].updates.append((update, node))
            found[name].of_head |= node in head
    return list(found.values())


def _of_head(graph: fx.Graph) -> set[fx.Node]:
    """The layers that make logits, and what stands behind them."""
    found, pending = set(), [outputs(graph)["initial_logits"]]
    while pending:
        node = pending.pop()
        found.add(node)
        if not is_tint(node, linear_forward):
            pending += [source for source in node.all_input_nodes if source.op == "call_function"]
    return found
