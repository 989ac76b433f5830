"""Appends the backward pass: reverse mode over the forward graph, one rule an operator.

    ... -> logits  ->  ... -> logits -> loss_gradient -> linear_backward -> norm_backward -> ...

Only values that depend on a trained slot get a gradient. The rules stand in `backward_rules.py`.
The gradient of each forward node is recorded on it for `build_descent`.
"""

from __future__ import annotations

import operator

from torch import fx

from tintc.ir.builder import Builder, descendants, input_node, outputs
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import CompilerBug, UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.ops.island import island_forward
from tintc.ir.ops.linear import linear_forward
from tintc.ir.ops.loss import loss_gradient, mean_embedding_gradient
from tintc.ir.pass_manager import graph_pass
from tintc.passes.train.backward_rules import Backward, Gradients, backward_rule

RULES = backward_rule.complete()


@graph_pass(
    requires=("named_outputs", "phases_in_order"), ensures=("well_formed", "phases_in_order")
)
def build_backward(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    forward = [n for n in graph.nodes if info(n).phase == "forward"]
    needed = _depends_on_trained(graph)
    logits = outputs(graph)["initial_logits"]
    with graph.inserting_before(graph.output_node()):
        backward = Backward(Builder(graph), context.config, needed)
        pending: dict[fx.Node, list[fx.Node]] = {}
        for value, gradient in _loss(graph, backward, logits):
            pending.setdefault(value, []).append(gradient)
        for node in reversed(forward):
            if node not in pending or node not in needed:
                continue
            if is_tint(node, island_forward):  # its results are items, which have gradients
                dy = pending.pop(node)[0]
            else:
                dy = backward.sum(node, pending.pop(node))
                info(node).gradient = dy
            if node.target is operator.getitem:
                pending.setdefault(node.all_input_nodes[0], []).append(dy)
                continue
            rule = RULES.of(node)
            if rule is None:
                raise CompilerBug(f"{node.name} calls {node.target}, which has no backward rule")
            for value, gradient in rule(backward, node, dy):
                pending.setdefault(value, []).append(gradient)
    return graph


def _loss(graph: fx.Graph, backward: Backward, logits: fx.Node) -> Gradients:
    kind = backward.config.loss_gradient
    targets, mask = input_node(graph, "targets"), input_node(graph, "loss_mask")
    if kind != "mean_embedding":
        return [(logits, backward.seed(loss_gradient, logits, logits, targets, mask, kind))]
    if not is_tint(logits, linear_forward):  # skips the logits and their softmax
        raise UnsupportedModelError(
            "loss_gradient mean_embedding needs logits that are one linear layer; use softmax"
        )
    x, weight, bias = (argument(logits, name) for name in ("x", "weight", "bias"))
    if any(read is not None and info(read).trainable for read in (weight, bias)):
        return [(logits, backward.seed(loss_gradient, logits, logits, targets, mask, kind))]
    return [(x, backward.seed(mean_embedding_gradient, logits, weight, targets, mask))]


def _depends_on_trained(graph: fx.Graph) -> set[fx.Node]:
    trained = {node for node in graph.nodes if info(node).trainable}
    return trained | descendants(trained)
