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
    steps, inner_lr = context.config.unrolled_steps, input_node(graph, "inner_lr")
    scales_first = _factor(context, 0) != 1
    for step in range(1, steps + 1):
        last = step == steps
        copies: dict[fx.Node, fx.Node] = {before[slot]: value for slot, value in newest.items()}
        with graph.inserting_before(output):
            if not last and (scheduled := _scheduled(graph, context, step)) is not None:
                copies[inner_lr] = scheduled
            elif not last and scales_first:  # what reads eta itself is not the first step's
                copies[inner_lr] = inner_lr
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
    _schedule_first(graph, context, body)
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


def _scheduled(graph: fx.Graph, context: Context, step: int) -> fx.Node | None:
    """The learning rate of a step; None where it is eta."""
    factor = _factor(context, step)
    if factor == 1:
        return None
    inner_lr = input_node(graph, "inner_lr")
    return Builder(graph).call(rate, inner_lr, None, factor, True, phase="descent", step=step)


def _factor(context: Context, step: int) -> float:
    """Of the learning rate; a loop passes the scheduled rate itself."""
    return 1.0 if context.config.looped else context.config.schedule_factor(step)


def _schedule_first(graph: fx.Graph, context: Context, body: list[fx.Node]) -> None:
    """The rate of the first step, which all copies were made from."""
    first = next((node for node in body if info(node).phase == "descent"), None)
    if first is None:
        return
    with graph.inserting_before(first):
        scheduled = _scheduled(graph, context, 0)
    inner_lr = input_node(graph, "inner_lr")
    for node in body if scheduled is not None else ():
        node.args = fx.node.map_arg(node.args, lambda n: scheduled if n is inner_lr else n)
