"""The layer that gives the logits."""

from __future__ import annotations

import operator

from torch import fx

from tintc.ir.builder import logits_node
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.elementwise import scale
from tintc.ir.ops.island import island_forward
from tintc.passes.analysis.sublayers import activations


def last_layer(graph: fx.Graph) -> fx.Node:
    """What the output reads, through multiples, a soft-cap or an island of it alone if need be."""
    node = logits_node(graph)
    while True:
        if is_tint(node, scale, activation_forward):
            node = argument(node, "x")
        elif node.target is operator.getitem and is_tint(node.all_input_nodes[0], island_forward):
            read = activations(node.all_input_nodes[0])
            if len(read) != 1:
                return node
            node = read[0]
        else:
            return node
