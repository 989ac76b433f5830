"""Which descents of a program may write over the weights that they get.

W' = descent(W, ...)  where W is an own weight, W' is the last that reads it, and nobody outside
                      holds it: an earlier descent made it, or the caller gave it away
"""

from __future__ import annotations

from torch import fx

from tintc.ir.choices import Choices
from tintc.ir.dialect import AnyOperator, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.in_place import IN_PLACE
from tintc.ir.ops.linear import linear_backward, linear_forward, linear_residual
from tintc.ir.ops.onednn import onednn_product
from tintc.ir.ops.states import change_square
from tintc.ir.ops.wide import wide_linear

# What reads a weight and returns no part of it.
_READ: tuple[AnyOperator, ...] = (
    linear_forward, linear_backward, linear_residual, onednn_product, wide_linear, change_square,
    *IN_PLACE,
)  # fmt: skip


def written_over(graph: fx.Graph, choices: Choices) -> frozenset[fx.Node]:
    """The descents. None where somebody differentiates."""
    if choices.differentiable:
        return frozenset()
    place = {node: number for number, node in enumerate(graph.nodes)}
    return frozenset(
        node
        for node in graph.nodes
        if is_tint(node, *IN_PLACE) and _is_last_to_read(node, place, choices)
    )


def _is_last_to_read(node: fx.Node, place: dict[fx.Node, int], choices: Choices) -> bool:
    weight = node.args[0]
    assert isinstance(weight, fx.Node)
    made = is_tint(weight, *IN_PLACE)
    given = choices.donated and weight.op == "placeholder" and info(weight).wide
    own = info(weight).shape == info(node).shape and len(info(node).shape) == 3
    others = [user for user in weight.users if user is not node]
    return (
        own
        and (made or given)
        and all(is_tint(user, *_READ) and place[user] < place[node] for user in others)
        and sum(source is weight for source in node.args) == 1
    )
