"""Repeats the step `config.steps` times and ends with a forward pass under the last weights.

    forward, backward, descent  ->  (forward, backward, descent) x steps, forward

Each copy reads the slot values that the copy before it wrote; what depends on no updated slot is
shared by all.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import infer_shape, outputs
from tintc.ir.context import Context
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops.linear import prefix
from tintc.ir.pass_manager import graph_pass


@graph_pass(
    requires=("named_outputs", "no_gradients_left"), ensures=("named_outputs", "phases_in_order")
)
def unroll_steps(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    output = graph.output_node()
    returned = outputs(graph)
    body = [n for n in graph.nodes if n.op == "call_function" and not is_tint(n, prefix)]
    reads = {info(n).slot: n for n in graph.nodes if is_tint(n, prefix)}
    updates, logits = returned["updates"], returned["logits"]
    newest = updates
    with graph.inserting_before(output):
        for step in range(1, context.config.steps + 1):
            last = step == context.config.steps
            copies: dict[fx.Node, fx.Node] = {reads[slot]: value for slot, value in newest.items()}
            for node in body:
                if (last and info(node).phase != "forward") or not any(
                    n in copies for n in node.all_input_nodes
                ):
                    continue
                copy = graph.node_copy(node, lambda n: copies.get(n, n))  # noqa: B023 (called at once)
                copy._rename(f"{node.name}_step{step}")
                copy_info(node, copy, step=step)
                copies[node] = copy
            if not last:
                newest = {slot: copies[node] for slot, node in updates.items()}
    output.args = ({**returned, "logits": copies.get(logits, logits), "updates": newest},)  # type: ignore[dict-item]
    return _reinfer(graph)


def _reinfer(graph: fx.Graph) -> fx.Graph:
    """Copies may read per-sequence weights where the original read shared ones, so shapes are
    computed anew.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            info(node).shape = infer_shape(node)
    return graph
