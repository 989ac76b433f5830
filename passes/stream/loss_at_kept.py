"""Loss stands at the kept positions alone: head, loss and the way back run on these.

    z = linear_forward(h, E); dz = loss_gradient(z, y, m); dh = linear_backward(dz, E)
      ->  h' = kept_tokens(h); z = linear_forward(h', E); dz = loss_gradient(z, y', m')
          dh = spread_tokens(linear_backward(dz, E), m)
    linear_descent(E, dz, h)  ->  linear_descent(E, dz, h')
    token_losses(z, labels)   ->  token_losses(z, labels')

with y', m', labels' of the kept tokens. Safe because the caller's loss mask is 0 elsewhere, and
every position's logits are its own.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import further_input, reinfer
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.head import token_losses
from tintc.ir.ops.loss import loss_gradient
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.narrowed_head import NarrowedHead, head_of


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def loss_at_kept(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    kept = NarrowedHead(graph, further_input(graph, "kept"), "T")
    of_logits = [n for n in graph.nodes if is_tint(n, loss_gradient, token_losses)]
    for node in of_logits:
        head = head_of(argument(node, "logits"))
        if head is not None:
            kept.narrow(head)
    for node in of_logits:  # what no such product stands before is computed for all tokens
        if is_tint(node, token_losses) and node not in kept.narrowed:
            node.args = (kept.of(argument(node, "logits")), kept.of(argument(node, "labels")))
    return reinfer(graph)
