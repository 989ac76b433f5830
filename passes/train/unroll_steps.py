"""Repeats the step and ends with a forward pass under the last weights.

    forward, backward, descent  ->  (forward, backward, descent) x steps, forward

Each copy reads the slot values, and the states of the inner rule, that the copy before it wrote;
what depends on no updated slot is shared by all. The learning rate of step k is eta times the
schedule's factor. More than `config.UNROLLED` steps stay one: its program runs in a loop, which
also passes the scheduled rate.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, before_step, input_node, outputs, reinfer
from tintc.ir.context import Context
from tintc.ir.dialect import operator_of
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops.rates import rate
from tintc.ir.pass_manager import graph_pass


@graph_pass(
    requires=("named_outputs", "no_gradients_left"), ensures=("named_outputs", "phases_in_order")
)
def unroll_steps(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    output = graph.output_node()
    returned = outputs(graph)
    body = [n for n in graph.nodes if n.op == "call_function" and not _reads(n)]
    made = {**returned["updates"], **returned.get("states", {})}
    before = before_step(graph)
    logits = returned["logits"]
    newest = dict(made)
    steps, first = context.config.unrolled_steps, _schedule_first(graph, context, body)
    for step in range(1, steps + 1):
        last = step == steps
        copies: dict[fx.Node, fx.Node] = {before[slot]: value for slot, value in newest.items()}
        with graph.inserting_before(output):
            if not last and (own := _rate(graph, context, step)) is not first:
                copies[first] = own
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
            newest = {slot: copies[node] for slot, node in made.items()}
    after = {
        kind: {slot: newest[slot] for slot in returned[kind]}
        for kind in ("updates", "states")
        if kind in returned
    }
    output.args = ({**returned, "logits": copies.get(logits, logits), **after},)  # type: ignore[dict-item]
    return reinfer(graph)


def _reads(node: fx.Node) -> bool:
    """Whether it is a first value, which no step changes."""
    called = operator_of(node)
    return called is not None and called.kind == "read"


def _rate(graph: fx.Graph, context: Context, step: int) -> fx.Node:
    """The learning rate of a step: eta where its factor is 1, and in a loop, which passes its own
    rate.
    """
    factor = 1.0 if context.config.looped else context.config.schedule_factor(step)
    inner_lr = input_node(graph, "inner_lr")
    if factor == 1:
        return inner_lr
    return Builder(graph).call(rate, inner_lr, None, factor, True, phase="descent", step=step)


def _schedule_first(graph: fx.Graph, context: Context, body: list[fx.Node]) -> fx.Node:
    """The rate of the first step, which all copies are made from; from now on it is what this reads
    in place of eta.
    """
    inner_lr = input_node(graph, "inner_lr")
    first = next((node for node in body if info(node).phase == "descent"), None)
    if first is None:
        return inner_lr
    with graph.inserting_before(first):
        scheduled = _rate(graph, context, 0)
    for node in body:
        node.args = fx.node.map_arg(node.args, lambda n: scheduled if n is inner_lr else n)
    return scheduled
