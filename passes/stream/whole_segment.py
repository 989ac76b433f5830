"""A window of a stream is trained on as a whole: nothing of it is cut off.

    segment(x, n), segment_mask(mask, n)  ->  x, mask

Safe because the caller passes n = T.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import reinfer
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.embedding import segment, segment_mask
from tintc.ir.pass_manager import graph_pass


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def whole_segment(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    for node in list(graph.nodes):
        if is_tint(node, segment, segment_mask):
            node.replace_all_uses_with(argument(node, "x" if is_tint(node, segment) else "mask"))
            graph.erase_node(node)
    return reinfer(graph)
