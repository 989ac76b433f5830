"""How few FLOPs any program of the same mathematics needs: what a call's own are shown beside."""

from __future__ import annotations

from torch import fx

from tintc.compiler.node_costs import NodeCosts
from tintc.ir.builder import ancestors, outputs
from tintc.ir.call_sizes import CallSizes
from tintc.ir.dialect import is_tint, operator_of
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_descent
from tintc.ir.program import Program
from tintc.page.operators import family
from tintc.runtime.specialize.cost_model import slot_uses

TEXT = (
    "Matrix products that the logits depend on, each once: the forward pass over the training "
    "tokens, the gradients as this configuration takes them, the forward pass under the updated "
    "weights, with what does not learn shared by both. Attention counts the pairs of tokens that "
    "the causal mask leaves. Of each trained matrix the cheaper of its gradient and of one product "
    "with the gradient's factors. A multiplication and an addition are two; norms, activations and "
    "softmax are not counted."
)


def lower_bound(program: Program, costs: NodeCosts, sizes: CallSizes) -> int:
    """costs: of the lowered graph at these sizes."""
    graph, segment = program.graph, sizes["segment"]
    uses = slot_uses(graph)
    found = sum(
        sizes["batch"] * use.least_products(sizes["tokens"], segment) for use in uses.values()
    )
    rounds = [found] if not program.config.looped else [found * program.config.steps]
    for node in ancestors([outputs(graph)["logits"]]):
        if node.name not in costs or _is_counted(node, set(uses)):
            continue
        flops = costs[node.name].flops * repeats(program, info(node).phase, info(node).step)
        rounds.append(round(flops * _causal(node, sizes)))
    return sum(rounds)


def repeats(program: Program, phase: str | None, step: int | None) -> int:
    """How often a node of the graph runs: many steps are a loop over the nodes of one."""
    config = program.config
    once = phase is None or not config.looped or step == config.unrolled_steps
    return 1 if once else config.steps


def _is_counted(node: fx.Node, slots: set[str]) -> bool:
    """Whether it is the descent of a slot whose update has been counted."""
    slot = (info(node).slot or "").partition("/")[0]
    return is_tint(node, linear_descent) and slot in slots


def _causal(node: fx.Node, sizes: CallSizes) -> float:
    """The part of its pairs of tokens that a causal mask leaves: (n + 1) / 2n of n tokens."""
    called = operator_of(node)
    if called is None or family(called) != "attention":
        return 1.0
    tokens = sizes["segment"] if "S" in info(node).shape else sizes["tokens"]
    return (tokens + 1) / (2 * tokens)
