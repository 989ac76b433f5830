"""Lets training passes see only the tokens that the loss depends on.

    forward(x_BTD) of a training step  ->  forward(segment(x_BTD, n)): tokens 0 .. n-1

n is a run-time input: one more than the last position that carries loss in any sequence of the
batch. Safe because the model is causal: no kept position reads a later one, and later positions
carry no loss. What the last forward pass shares with the training passes (the embeddings, frozen
blocks) stays whole and is computed once. A caller who wants `initial_logits` of all tokens passes n
= T.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, input_node, outputs, reinfer
from tintc.ir.context import Context
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import segment, segment_mask
from tintc.ir.ops.linear import prefix
from tintc.ir.pass_manager import graph_pass


@graph_pass(
    requires=("named_outputs", "phases_in_order"),
    ensures=("named_outputs", "phases_in_order", "shapes_agree"),
)
def truncate_segment(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    updated = set(outputs(graph)["updates"])
    training: set[fx.Node] = set()
    for node in graph.nodes:
        if (
            node.op != "call_function"
            or is_tint(node, prefix)
            or info(node).step == context.config.unrolled_steps
        ):
            continue
        depends = any(
            source in training or info(source).slot in updated for source in node.all_input_nodes
        )
        if depends or info(node).phase != "forward":
            training.add(node)
    length = input_node(graph, "segment")
    cut: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n in training]:
        for source in node.all_input_nodes:
            if source not in training and "T" in info(source).shape and source not in cut:
                cut[source] = _cut(graph, source, length)
        node.args = fx.node.map_arg(node.args, lambda n: cut.get(n, n))
    return reinfer(graph)


def _cut(graph: fx.Graph, source: fx.Node, length: fx.Node) -> fx.Node:
    """`segment` of a value, put right behind it (an input: behind all inputs)."""
    behind = source
    if source.op == "placeholder":
        behind = [n for n in graph.nodes if n.op == "placeholder"][-1]
    operator = segment_mask if info(source).dtype == "bool" else segment
    with graph.inserting_after(behind):
        fields = {"phase": "forward", "step": 0}
        return Builder(graph).call(
            operator, source, length, like=source, label=f"{source.name}_segment", **fields
        )
