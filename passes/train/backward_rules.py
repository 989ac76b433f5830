"""The backward rule of each forward operator: (pass so far, node, dy) -> gradients of its inputs.

Formulas and approximations: TINT.md section 2.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from tintc.ir.builder import Builder, operands, outputs
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import AnyOperator, argument, is_tint
from tintc.ir.island import read
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_backward, activation_forward
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
)
from tintc.ir.ops.elementwise import multiply, residual, scale
from tintc.ir.ops.embedding import embedding, without_padding
from tintc.ir.ops.island import island_backward, island_forward
from tintc.ir.ops.linear import linear_backward, linear_forward, prefix
from tintc.ir.ops.norm import norm_backward, norm_forward
from tintc.ir.ops.position import rotary
from tintc.ir.rules import RuleTable

Gradients = list[tuple[fx.Node, fx.Node]]  # (value, gradient at it)


class Backward:
    """The backward pass under construction. needed: values that depend on a trained slot; no other
    gets a gradient.
    """

    def __init__(self, build: Builder, config: SimulatorConfig, needed: set[fx.Node]) -> None:
        self.build, self.config, self.needed = build, config, needed
        self.behind_head = _behind_head(outputs(build.graph)["initial_logits"])

    def call(self, operator: AnyOperator, node: fx.Node, *args: Any) -> fx.Node:
        """A call that belongs to the backward pass of `node`."""
        return self._call(operator, f"{node.name}_backward", node, *args)

    def seed(self, operator: AnyOperator, logits: fx.Node, *args: Any) -> fx.Node:
        """The node where the backward pass starts."""
        return self._call(operator, "loss_gradient", logits, *args)

    def sum(self, node: fx.Node, gradients: list[fx.Node]) -> fx.Node:
        """All that reaches a value, added up."""
        total = gradients[0]
        for more in gradients[1:]:
            total = self._call(residual, f"{node.name}_gradient", node, total, more)
        return total

    def _call(self, operator: AnyOperator, label: str, node: fx.Node, *args: Any) -> fx.Node:
        return self.build.call(operator, *args, like=node, label=label, phase="backward", step=0)


def _behind_head(logits: fx.Node) -> set[fx.Node]:
    """What scales and caps the head's product on its way to the logits."""
    found: set[fx.Node] = set()
    while is_tint(logits, scale, activation_forward):
        found.add(logits)
        logits = argument(logits, "x")
    return found if is_tint(logits, linear_forward) else set()


BackwardRule = Callable[[Backward, fx.Node, Any], Gradients]
backward_rule = RuleTable[BackwardRule]("backward", needed_by=lambda o: o.kind == "forward")


@backward_rule(residual)
def _residual(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    return [(x, dy) for x in (argument(node, "x"), argument(node, "y"))]


@backward_rule(multiply)
def _multiply(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    x, y = argument(node, "x"), argument(node, "y")
    return [
        (value, backward.call(multiply, node, dy, other))
        for value, other in ((x, y), (y, x))
        if value in backward.needed
    ]


@backward_rule(scale)
def _scale(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    return [(argument(node, "x"), backward.call(scale, node, dy, argument(node, "factor")))]


@backward_rule(rotary)
def _rotary(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    tables = [argument(node, name) for name in ("cos", "sin", "heads", "pairing")]
    dx = backward.call(rotary, node, dy, *tables, not argument(node, "transpose"))
    return [(argument(node, "x"), dx)]


@backward_rule(linear_forward)
def _linear(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    x = argument(node, "x")
    if x not in backward.needed:
        return []
    return [(x, backward.call(linear_backward, node, dy, argument(node, "weight")))]


@backward_rule(norm_forward)
def _norm(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    x = argument(node, "x")
    if x not in backward.needed:
        return []
    shared = [argument(node, name) for name in ("gamma", "eps", "kind", "heads", "offset")]
    how = (backward.config.norm_gradient, backward.config.finite_difference_scale)
    return [(x, backward.call(norm_backward, node, dy, x, *shared, *how))]


@backward_rule(activation_forward)
def _activation(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    x = argument(node, "x")
    # A soft-cap of the logits belongs to the loss, whose gradient follows the chain rule
    # (docs/TINT.md section 2).
    gradient = "exact" if node in backward.behind_head else backward.config.activation_gradient
    how = (argument(node, "kind"), gradient, backward.config.finite_difference_scale)
    return [(x, backward.call(activation_backward, node, dy, x, *how))]


@backward_rule(embedding)
def _embedding(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    """The model begins here. The row of padding does not learn from what reads it."""
    index, offset, padding = (argument(node, name) for name in ("index", "offset", "padding"))
    if padding is not None and padding >= 0:
        info(node).gradient = backward.call(without_padding, node, dy, index, padding - offset)
    return []


@backward_rule(attention_forward)
def _attention(backward: Backward, node: fx.Node, dy: fx.Node) -> Gradients:
    q, k, v, *how = (
        argument(node, name)
        for name in ("q", "k", "v", "mask", "bias", "heads", "kv_heads", "scale", "softcap")
    )
    through_scores = q in backward.needed or k in backward.needed
    if backward.config.attention_gradient == "value" or not through_scores:
        if v not in backward.needed:
            return []
        return [(v, backward.call(attention_backward_value, node, dy, q, k, *how))]
    every = backward.call(attention_backward_full, node, dy, q, k, v, *how)
    names = ("dq", "dk", "dv")
    return [
        (x, backward.build.item(every, i, f"{node.name}_{names[i]}"))
        for i, x in enumerate((q, k, v))
        if x in backward.needed
    ]


@backward_rule(island_forward)
def _island(backward: Backward, node: fx.Node, dy: None) -> Gradients:
    """Exact whatever the config says: torch's own. Its results' gradients are on their items."""
    inputs, mask, program = (argument(node, name) for name in ("inputs", "mask", "program"))
    island = read(program)
    items: dict[Any, fx.Node] = {
        operands(user)[1]: user for user in node.users if user.target is operator.getitem
    }
    gradients = [info(items[i]).gradient if i in items else None for i in range(len(island.widths))]
    wanted = [i for i in island.learning if inputs[i] in backward.needed]
    if not wanted:
        return []
    every = backward.call(island_backward, node, gradients, inputs, mask, program, wanted)
    info(node).gradient = every
    found = [
        (inputs[i], backward.build.item(every, at, f"{node.name}_gradient_{i}"))
        for at, i in enumerate(wanted)
    ]
    return [(x, dx) for x, dx in found if not is_tint(x, prefix)]
