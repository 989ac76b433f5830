"""Appends the backward pass: reverse mode over the forward graph, one rule an operator.

    ... -> logits  ->  ... -> logits -> loss_gradient -> linear_backward -> norm_backward -> ...

Only values that depend on a trained slot get a gradient. Rules and approximations: TINT.md section
2. The gradient of each forward node is recorded on it for `build_descent`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from tintc.ir.builder import Builder, descendants, input_node, outputs
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint, tint_name
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass

Gradients = list[tuple[fx.Node, fx.Node]]  # (value, gradient at it)


class _Rules:
    """Backward of each forward operator: (node, dy) -> gradients of its inputs."""

    def __init__(self, build: Builder, config: SimulatorConfig, needed: set[fx.Node]) -> None:
        self.build, self.config, self.needed = build, config, needed
        heads = [
            n
            for n in build.graph.nodes
            if is_tint(n, "linear_forward") and info(argument(n, "weight")).slot is None
        ]
        self.behind_head = descendants(heads)

    def call(self, name: str, node: fx.Node, *args: Any) -> fx.Node:
        return self.build.call(
            name, *args, like=node, label=f"{node.name}_backward", phase="backward", step=0
        )

    def seed(self, logits: fx.Node, name: str, *args: Any) -> fx.Node:
        """The node where the backward pass starts."""
        return self.build.call(
            name, *args, like=logits, label="loss_gradient", phase="backward", step=0
        )

    def residual(self, node: fx.Node, dy: fx.Node) -> Gradients:
        return [(x, dy) for x in (argument(node, "x"), argument(node, "y"))]

    def multiply(self, node: fx.Node, dy: fx.Node) -> Gradients:
        x, y = argument(node, "x"), argument(node, "y")
        return [
            (value, self.call("multiply", node, dy, other))
            for value, other in ((x, y), (y, x))
            if value in self.needed
        ]

    def scale(self, node: fx.Node, dy: fx.Node) -> Gradients:
        return [(argument(node, "x"), self.call("scale", node, dy, argument(node, "factor")))]

    def rotary(self, node: fx.Node, dy: fx.Node) -> Gradients:
        tables = [argument(node, name) for name in ("cos", "sin", "heads", "pairing")]
        return [
            (
                argument(node, "x"),
                self.call("rotary", node, dy, *tables, not argument(node, "transpose")),
            )
        ]

    def linear_forward(self, node: fx.Node, dy: fx.Node) -> Gradients:
        x = argument(node, "x")
        return (
            [(x, self.call("linear_backward", node, dy, argument(node, "weight")))]
            if x in self.needed
            else []
        )

    def norm_forward(self, node: fx.Node, dy: fx.Node) -> Gradients:
        x = argument(node, "x")
        if x not in self.needed:
            return []
        shared = [argument(node, name) for name in ("gamma", "eps", "kind", "heads", "offset")]
        how = (self.config.norm_gradient, self.config.finite_difference_scale)
        return [(x, self.call("norm_backward", node, dy, x, *shared, *how))]

    def activation_forward(self, node: fx.Node, dy: fx.Node) -> Gradients:
        x = argument(node, "x")
        # A soft-cap of the logits belongs to the loss, whose gradient follows the chain rule
        # (docs/TINT.md section 2).
        gradient = "exact" if node in self.behind_head else self.config.activation_gradient
        how = (argument(node, "kind"), gradient, self.config.finite_difference_scale)
        return [(x, self.call("activation_backward", node, dy, x, *how))]

    def attention_forward(self, node: fx.Node, dy: fx.Node) -> Gradients:
        q, k, v, *how = (
            argument(node, name)
            for name in ("q", "k", "v", "mask", "bias", "heads", "kv_heads", "scale", "softcap")
        )
        if self.config.attention_gradient == "value":
            return (
                [(v, self.call("attention_backward_value", node, dy, q, k, *how))]
                if v in self.needed
                else []
            )
        every = self.call("attention_backward_full", node, dy, q, k, v, *how)
        names = ("dq", "dk", "dv")
        return [
            (x, self.build.item(every, i, f"{node.name}_{names[i]}"))
            for i, x in enumerate((q, k, v))
            if x in self.needed
        ]


@graph_pass(
    requires=("named_outputs", "phases_in_order"), ensures=("well_formed", "phases_in_order")
)
def build_backward(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    forward = [n for n in graph.nodes if info(n).phase == "forward"]
    needed = _depends_on_trained(graph)
    output = graph.output_node()
    logits = outputs(graph)["initial_logits"]
    with graph.inserting_before(output):
        build = Builder(graph)
        rules = _Rules(build, context.config, needed)
        pending: dict[fx.Node, list[fx.Node]] = {}
        for value, gradient in _loss(graph, rules, logits):
            pending.setdefault(value, []).append(gradient)
        for node in reversed(forward):
            if node not in pending or node not in needed:
                continue
            dy = _sum(build, node, pending.pop(node))
            info(node).gradient = dy
            rule: Callable[[fx.Node, fx.Node], Gradients] = getattr(rules, tint_name(node) or "")
            for value, gradient in rule(node, dy):
                pending.setdefault(value, []).append(gradient)
    return graph


def _loss(graph: fx.Graph, rules: _Rules, logits: fx.Node) -> Gradients:
    kind = rules.config.loss_gradient
    targets, mask = input_node(graph, "targets"), input_node(graph, "loss_mask")
    if kind == "mean_embedding":  # skips the logits and their softmax
        if not is_tint(logits, "linear_forward"):
            raise UnsupportedModelError(
                "loss_gradient mean_embedding needs logits that are one linear layer; use softmax"
            )
        return [
            (
                argument(logits, "x"),
                rules.seed(
                    logits, "mean_embedding_gradient", argument(logits, "weight"), targets, mask
                ),
            )
        ]
    return [(logits, rules.seed(logits, "loss_gradient", logits, targets, mask, kind))]


def _depends_on_trained(graph: fx.Graph) -> set[fx.Node]:
    trained = {node for node in graph.nodes if info(node).trainable}
    return trained | descendants(trained)


def _sum(build: Builder, node: fx.Node, gradients: list[fx.Node]) -> fx.Node:
    total = gradients[0]
    for more in gradients[1:]:
        total = build.call(
            "residual",
            total,
            more,
            like=node,
            label=f"{node.name}_gradient",
            phase="backward",
            step=0,
        )
    return total
