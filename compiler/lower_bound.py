"""How few FLOPs any program of the same mathematics needs: what a call's own are shown beside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from tintc.compiler.node_costs import NodeCosts
from tintc.ir.builder import ancestors, outputs
from tintc.ir.call_sizes import CallSizes, length
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
)
from tintc.ir.ops.linear import linear_descent
from tintc.ir.program import Program
from tintc.runtime.specialize.cost_model import slot_uses

TEXT = (
    "Matrix products that the logits depend on, each once: the forward pass over the training "
    "tokens, the gradients as this configuration takes them, the forward pass under the updated "
    "weights, with what does not learn shared by both. Attention counts the pairs of tokens that "
    "the causal mask leaves, its scores not again in the backward pass. Of each trained matrix the "
    "cheaper of its gradient and of one product with the gradient's factors. A multiplication and "
    "an addition are two; norms, activations and softmax are not counted."
)

_ATTENTION = (attention_forward, attention_backward_value, attention_backward_full)


@dataclass(frozen=True)
class Needed:
    """FLOPs that no program does without, for one node of the lowered graph; those of a slot's
    update for the last of its descents.
    """

    node: fx.Node
    flops: float


def lower_bound(program: Program, costs: NodeCosts, sizes: CallSizes) -> int:
    """costs: of the lowered graph at these sizes."""
    return round(sum(each.flops for each in needed(program, costs, sizes)))


def needed(program: Program, costs: NodeCosts, sizes: CallSizes) -> Iterator[Needed]:
    """The same, node by node."""
    graph = program.graph
    uses = slot_uses(graph)
    for slot, use in uses.items():
        least = sizes["batch"] * use.least_products(sizes["tokens"], sizes["segment"])
        rounds = program.config.steps if program.config.looped else 1
        yield Needed(_descent(graph, slot), least * rounds)
    for node in ancestors([outputs(graph)["logits"]]):
        if node.name not in costs or _is_counted(node, set(uses)):
            continue
        record = info(node)
        # what sees all tokens before the last pass depends on nothing that learns
        times = 1 if "T" in record.shape else repeats(program, record.phase, record.step)
        flops = _products(node, costs[node.name].flops, sizes) * times
        yield Needed(node, flops)


def repeats(program: Program, phase: str | None, step: int | None) -> int:
    """How often a node of the graph runs: many steps are a loop over the nodes of one."""
    config = program.config
    once = phase is None or not config.looped or step == config.unrolled_steps
    return 1 if once else config.steps


def _descent(graph: fx.Graph, slot: str) -> fx.Node:
    """The last of a slot."""
    found: list[fx.Node] = [node for node in graph.nodes if _is_counted(node, {slot})]
    return found[-1]


def _is_counted(node: fx.Node, slots: set[str]) -> bool:
    """Whether it is the descent of a slot whose update has been counted."""
    slot = (info(node).slot or "").partition("/")[0]
    return is_tint(node, linear_descent) and slot in slots


def _products(node: fx.Node, flops: int, sizes: CallSizes) -> float:
    """Of attention only the pairs of tokens that a causal mask leaves, (n + 1) / 2n of n tokens,
    and in the backward pass not the scores, which are known from the forward pass.
    """
    if not is_tint(node, *_ATTENTION):
        return flops
    queries, keys = (info(argument(node, name)).shape for name in ("q", "k"))
    tokens, seen = length(sizes, queries[1]), length(sizes, keys[1])
    width = queries[-1]
    assert isinstance(width, int)
    known = 0 if is_tint(node, attention_forward) else 2 * sizes["batch"] * tokens * seen * width
    # the queries are the last of the tokens: the first of them sees seen - tokens + 1 keys
    return (flops - known) * (seen - (tokens - 1) / 2) / seen
