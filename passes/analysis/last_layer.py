"""The layer that gives the logits."""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import logits_node
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.elementwise import scale


def last_layer(graph: fx.Graph) -> fx.Node:
    """What the output reads, through multiples and a soft-cap if need be."""
    node = logits_node(graph)
    while is_tint(node, scale, activation_forward):
        node = argument(node, "x")
    return node
