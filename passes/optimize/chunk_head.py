"""Takes the vocabulary head in chunks of tokens where only its loss is wanted, so that a (B, T, V)
tensor never exists for it.

    z = linear_forward(h, E, b), scaled or capped; loss_gradient(z, ...), back to h
      ->  head_gradient(h, E, b, ...)
    z = linear_forward(h, E, b), scaled or capped; token_losses(z, labels)
      ->  head_losses(h, E, b, labels, ...)
    both of one z
      ->  head_losses_and_gradient(h, E, b, ...)
    z = linear_forward(h, E, b), scaled or capped; an output
      ->  head_logits(h, E, b, ..., into)

The last only where the caller gives the tensor that logits are written into, which saves them from
existing twice. Safe because every position's logits are its own. The gradient is left alone where
the logits themselves are wanted too, and where somebody may ask for gradients of the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from tintc.ir.builder import Builder, further_input, remove_dead
from tintc.ir.calibration import Calibration
from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_backward, activation_forward
from tintc.ir.ops.elementwise import scale
from tintc.ir.ops.head import (
    head_gradient,
    head_logits,
    head_losses,
    head_losses_and_gradient,
    token_losses,
)
from tintc.ir.ops.linear import linear_backward, linear_forward
from tintc.ir.ops.loss import loss_gradient
from tintc.ir.outputs import Output
from tintc.ir.pass_manager import graph_pass


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def chunk_head(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    if context.choices.differentiable:
        return graph
    for node in [n for n in graph.nodes if is_tint(n, loss_gradient, token_losses)]:
        head = _head(node.args[0], context.choices.calibration)
        if head is not None:
            (_fuse_gradient if is_tint(node, loss_gradient) else _fuse_losses)(
                Builder(graph), node, head
            )
    if context.choices.into:
        _write_outputs(graph, context.choices.calibration)
    remove_dead(graph)
    return graph


def _write_outputs(graph: fx.Graph, speed: Calibration) -> None:
    output = graph.output_node()
    returned: dict[str, Any] = dict(output.args[0])  # type: ignore[arg-type]
    for kind in (Output.LOGITS, Output.INITIAL_LOGITS):
        name = kind.value
        head = _head(returned[name], speed) if name in returned else None
        if head is None or len(returned[name].users) != 1:  # the gradient of the loss needs them
            continue
        into = further_input(graph, kind.into)
        with graph.inserting_before(output):
            fields = {"phase": info(head.linear).phase, "step": info(head.linear).step}
            args = (*head.arguments(), *head.kinds(), into, head.rows, False)
            returned[name] = Builder(graph).call(
                head_logits, *args, like=head.linear, label=f"{name}_written", **fields
            )
    output.args = (returned,)


@dataclass(frozen=True)
class _Head:
    """linear: the head's product; behind: scales and activations between it and the loss, in
    order; rows: tokens of a chunk.
    """

    linear: fx.Node
    behind: list[fx.Node]
    rows: int

    def arguments(self) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        x, weight, bias = (argument(self.linear, name) for name in ("x", "weight", "bias"))
        return x, weight, bias

    def kinds(self) -> tuple[list[str], list[float]]:
        names = ["scale" if is_tint(n, scale) else str(argument(n, "kind")) for n in self.behind]
        return names, [
            float(argument(n, "factor")) if is_tint(n, scale) else 1.0 for n in self.behind
        ]


def _head(logits: fx.Node, speed: Calibration) -> _Head | None:
    """The head that these logits come from; None for anything else, and for a head whose weight
    learns.
    """
    behind: list[fx.Node] = []
    node = logits
    while is_tint(node, scale, activation_forward):
        behind.insert(0, node)
        node = argument(node, "x")
    if not is_tint(node, linear_forward) or len(info(argument(node, "weight")).shape) != 2:
        return None
    bias = argument(node, "bias")
    own = bias is not None and len(info(bias).shape) > 1
    return None if own else _Head(node, behind, _rows(argument(node, "weight"), speed))


def _rows(weight: fx.Node, speed: Calibration) -> int:
    """Tokens of a chunk: as few as keep a measured product busy; 0 for the operators' own."""
    if not speed.measured:
        return 0
    columns, inner = map(int, info(weight).shape)
    return speed.full_rows(inner, columns)


def _fuse_gradient(build: Builder, loss: fx.Node, head: _Head) -> None:
    """Replaces the linear_backward at the end of the way back, if everything on it serves this
    alone.
    """
    way = [loss]
    for forward in reversed(head.behind):
        backward = _only_user(way[-1])
        if backward is None or not _goes_back(forward, backward):
            return
        way.append(backward)
    last = _only_user(way[-1])
    own = {*head.behind, head.linear}
    wanted = [
        user
        for node in own
        for user in node.users
        if user not in own and user not in way and not is_tint(user, token_losses)
    ]
    targets, mask, kind = (argument(loss, name) for name in ("targets", "mask", "kind"))
    if (
        last is None
        or kind == "mean_embedding"  # only where the head learns
        or not is_tint(last, linear_backward)
        or argument(last, "weight") is not head.arguments()[1]
        or wanted
    ):
        return
    logits: fx.Node = argument(loss, "logits")
    scored = [user for user in logits.users if is_tint(user, token_losses)]
    if len(scored) == 1:
        _fuse_both(build, scored[0], last, (targets, mask, kind), head)
        return
    _replace(
        build,
        last,
        head_gradient,
        (*head.arguments(), targets, mask, kind, *head.kinds(), head.rows, False),
    )


def _fuse_both(
    build: Builder, losses: fx.Node, last: fx.Node, of_loss: tuple[object, ...], head: _Head
) -> None:
    """losses: the token_losses of the same logits, which nothing but an output reads."""
    labels = argument(losses, "labels")
    place: dict[str, Any] = {"phase": info(last).phase, "step": info(last).step}
    with build.graph.inserting_before(last):
        both = build.call(
            head_losses_and_gradient, *head.arguments(), labels, *of_loss, *head.kinds(),
            head.rows, False, like=last, label=f"{last.name}_and_losses", **place,
        )  # fmt: skip
        losses.replace_all_uses_with(build.item(both, 0, label=losses.name))
        last.replace_all_uses_with(build.item(both, 1, label=last.name))


def _fuse_losses(build: Builder, losses: fx.Node, head: _Head) -> None:
    own = {*head.behind, head.linear}
    if not [
        user
        for node in own
        for user in node.users
        if user not in own and not is_tint(user, token_losses, loss_gradient)
    ]:
        _replace(
            build,
            losses,
            head_losses,
            (*head.arguments(), argument(losses, "labels"), *head.kinds(), head.rows, False),
        )


def _goes_back(forward: fx.Node, backward: fx.Node) -> bool:
    """Whether a node is the exact backward pass of what stands behind the head."""
    if is_tint(forward, scale):
        return is_tint(backward, scale)
    return is_tint(backward, activation_backward) and argument(backward, "gradient") == "exact"


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(
    build: Builder, node: fx.Node, operator: AnyOperator, args: tuple[object, ...]
) -> None:
    with build.graph.inserting_before(node):
        new = build.call(
            operator,
            *args,
            like=node,
            label=node.name,
            phase=info(node).phase,
            step=info(node).step,
        )
    node.replace_all_uses_with(new)
