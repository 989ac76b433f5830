"""How few FLOPs any program of the same mathematics needs: what a call's own are shown beside."""

from __future__ import annotations

from torch import fx

from tintc.compiler.node_costs import NodeCosts
from tintc.ir.builder import ancestors, outputs
from tintc.ir.call_sizes import CallSizes
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


def lower_bound(program: Program, costs: NodeCosts, sizes: CallSizes) -> int:
    """costs: of the lowered graph at these sizes."""
    graph, segment = program.graph, sizes["segment"]
    uses = slot_uses(graph)
    found = sum(
        sizes["batch"] * use.least_products(sizes["tokens"], segment) for use in uses.values()
    )
    rounds: list[float] = [found * (program.config.steps if program.config.looped else 1)]
    for node in ancestors([outputs(graph)["logits"]]):
        if node.name not in costs or _is_counted(node, set(uses)):
            continue
        record = info(node)
        # what sees all tokens before the last pass depends on nothing that learns
        times = 1 if "T" in record.shape else repeats(program, record.phase, record.step)
        rounds.append(_products(node, costs[node.name].flops, sizes) * times)
    return round(sum(rounds))


def repeats(program: Program, phase: str | None, step: int | None) -> int:
    """How often a node of the graph runs: many steps are a loop over the nodes of one."""
    config = program.config
    once = phase is None or not config.looped or step == config.unrolled_steps
    return 1 if once else config.steps


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
    shape = info(argument(node, "q")).shape
    tokens = sizes["segment"] if "S" in shape else sizes["tokens"]
    width = shape[-1]
    assert isinstance(width, int)
    known = 0 if is_tint(node, attention_forward) else 2 * sizes["batch"] * tokens**2 * width
    return (flops - known) * (tokens + 1) / (2 * tokens)
