"""Takes the loss where it stands: of training passes head, loss and the way back through the head
run at the positions that carry loss in any sequence, which the caller names.

    as `passes/analysis/narrowed_head.py` says, at the positions `scored`

`kept_first` goes on from there: the way back through the last block begins at these positions. Safe
because the loss mask is 0 elsewhere, and every position's logits are its own. Where logits before
the update are wanted too, only behind `whole_initial`, which gives training a head of its own.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import further_input, reinfer
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.loss import loss_gradient
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.narrowed_head import NarrowedHead, head_of
from tintc.passes.optimize.whole_initial import whole_initial


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def scored_loss(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    choices = context.choices
    initial = any(kind.is_before for kind in choices.outputs)
    if not choices.scored or (initial and whole_initial.name not in choices.enabled):
        return graph
    losses = [node for node in graph.nodes if is_tint(node, loss_gradient)]
    if not losses:
        return graph
    kept = NarrowedHead(graph, further_input(graph, "scored"), "S")
    for node in losses:
        head = head_of(argument(node, "logits"))
        if head is not None:
            kept.narrow(head)
    return reinfer(graph)
