"""Logits before the update are those of all tokens, and training goes back from the segment alone.

    h = f(segment(x, n)), an ancestor of initial logits  ->  h = f(x)
    g(h) of the way back                                 ->  g(segment(h, n))
    loss_gradient(head(h))                               ->  loss_gradient(head(segment(h, n)))

Without it the caller passes n = T, and the way back runs over tokens that carry no loss. Safe
because the model is causal: the first tokens of a pass over all are those of a pass over the first.
The head of the training pass is one of its own: its logits may be made in chunks, or at few
positions.
"""

from __future__ import annotations

import operator

from torch import fx

from tintc.ir.builder import Builder, ancestors, input_node, reinfer, remove_dead
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import copy_info, info, shapes_of
from tintc.ir.ops.embedding import segment, segment_mask
from tintc.ir.ops.loss import loss_gradient
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.narrowed_head import behind_head, head_of


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def whole_initial(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    choices = context.choices
    returned: dict[str, fx.Node] = graph.output_node().args[0]  # type: ignore[assignment]
    before = [returned[kind.value] for kind in choices.outputs if kind.is_before]
    if choices.window or not before:
        return graph
    wanted = ancestors(before)
    # each of several values is taken from what all of them are computed by
    wanted |= {user for node in wanted for user in node.users if user.target is operator.getitem}
    for loss in [n for n in graph.nodes if is_tint(n, loss_gradient)]:
        _own_head(graph, loss, wanted)
    for node in [n for n in graph.nodes if n in wanted and _is_of_segment(n)]:
        if not is_tint(node, segment, segment_mask):
            node.args = fx.node.map_arg(node.args, _uncut)
            _cut_for_others(graph, node, wanted)
    remove_dead(graph)
    return reinfer(graph)


def _is_of_segment(node: fx.Node) -> bool:
    return any("S" in shape for shape in shapes_of(node))


def _uncut(value: fx.Node) -> fx.Node:
    if is_tint(value, segment, segment_mask):
        whole: fx.Node = value.args[0]  # type: ignore[assignment]
        return whole
    return value


def _own_head(graph: fx.Graph, loss: fx.Node, wanted: set[fx.Node]) -> None:
    """The training pass makes its logits itself."""
    head = head_of(argument(loss, "logits"))
    if head is None or head not in wanted:
        return
    copies: dict[fx.Node, fx.Node] = {}
    for node in [head, *behind_head(argument(loss, "logits"))]:
        others = _others(node, wanted)
        with graph.inserting_after(node):
            copies[node] = copy = graph.node_copy(node, lambda n: copies.get(n, n))
        copy_info(node, copy)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user: user in others)  # noqa: B023


def _others(node: fx.Node, wanted: set[fx.Node]) -> set[fx.Node]:
    """Who reads a value and is no ancestor of the initial logits."""
    return {user for user in node.users if user not in wanted and user.op != "output"}


def _cut_for_others(graph: fx.Graph, node: fx.Node, wanted: set[fx.Node]) -> None:
    """Whoever is no ancestor of the initial logits reads the segment."""
    others = _others(node, wanted)
    if not others:
        return
    cut = segment_mask if info(node).dtype == "bool" else segment
    fields = {"phase": info(node).phase, "step": info(node).step}
    with graph.inserting_after(node):
        part = Builder(graph).call(
            cut, node, input_node(graph, "segment"), like=node, label=f"{node.name}_segment",
            shape=info(node).shape, **fields,
        )  # fmt: skip
    node.replace_all_uses_with(part, delete_user_cb=lambda user: user in others)
