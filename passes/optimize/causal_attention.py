"""Tells attention that the mask is the causal one and nothing else, where the call has no other.

    attention_forward(q, k, v, mask)  ->  attention_forward(q, k, v, None)

and likewise backward. The kernels then skip what lies above the diagonal and read no mask. A layer
with a bias (ALiBi) or a window keeps its mask, which it combines with them.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import input_node, remove_dead
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
)
from tintc.ir.ops.embedding import segment_mask
from tintc.ir.pass_manager import graph_pass

_ATTENTION = (attention_forward, attention_backward_value, attention_backward_full)


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def causal_attention(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    if not context.choices.causal:
        return graph
    whole = input_node(graph, "attention_mask")
    for node in [n for n in graph.nodes if is_tint(n, *_ATTENTION)]:
        mask = argument(node, "mask")
        plain = mask is whole or (is_tint(mask, segment_mask) and argument(mask, "mask") is whole)
        if plain and argument(node, "bias") is None:
            node.args = tuple(None if value is mask else value for value in node.args)
    remove_dead(graph)
    return graph
