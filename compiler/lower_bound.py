"""How few FLOPs any program of the same mathematics needs: what a call's own are shown beside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from tintc.compiler.node_costs import NodeCosts
from tintc.ir.builder import ancestors, before_step, descendants, outputs
from tintc.ir.call_sizes import CallSizes, Predict, length
from tintc.ir.choices import Choices
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
)
from tintc.ir.ops.embedding import kept_tokens, segment
from tintc.ir.ops.linear import linear_descent, linear_forward
from tintc.ir.outputs import Output
from tintc.ir.program import Program
from tintc.passes.analysis.update_forms import Forms
from tintc.passes.optimize.kept_first import kept_first
from tintc.runtime.specialize.cost_model import slot_uses
from tintc.runtime.specialize.optimize import optimize

TEXT = (
    "Matrix products that the logits depend on, each once: the forward pass over the training "
    "tokens, the gradients as this configuration takes them, the forward pass under the updated "
    "weights, with what does not learn shared by both, and products of inputs that no update "
    "reaches. Attention counts the pairs of tokens that "
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


def lower_bound(
    program: Program, costs: NodeCosts, sizes: CallSizes, graph: fx.Graph | None = None
) -> int:
    """graph: the lowered one, or what `wanted_graph` left of it. costs: of its nodes."""
    return round(sum(each.flops for each in needed(program, costs, sizes, graph)))


def wanted_graph(program: Program, predict: Predict) -> fx.Graph:
    """The lowered graph; for the logits of some positions, what these depend on."""
    if predict == "all":
        return program.graph
    enabled = frozenset([kept_first.name])
    return optimize(program, Choices((Output.LOGITS,), some_tokens=True, enabled=enabled))


def needed(
    program: Program, costs: NodeCosts, sizes: CallSizes, graph: fx.Graph | None = None
) -> Iterator[Needed]:
    """The same, node by node."""
    graph = program.graph if graph is None else graph
    # what an island reads as well has a gradient of the island's: counted where it is computed
    uses = {s: use for s, use in slot_uses(program.graph).items() if _descents(graph, s)}
    narrow = {
        info(argument(node, "weight")).slot
        for node in graph.nodes
        if is_tint(node, linear_forward) and info(node).shape[1] == "K"
    }
    for slot, use in uses.items():
        tokens = length(sizes, "K" if slot in narrow else "T")
        least = sizes["batch"] * use.least_products(tokens, sizes["segment"])
        rounds = program.config.steps if program.config.looped else 1
        yield Needed(_descents(graph, slot)[-1], least * rounds)
    again = _again(program, graph, costs)
    for node in ancestors([outputs(graph)["logits"]]):
        if node.name not in costs or node in again or _is_counted(node, set(uses)):
            continue
        record = info(node)
        # what sees all tokens before the last pass depends on nothing that learns
        whole = "T" in record.shape or "K" in record.shape
        times = 1 if whole else repeats(program, record.phase, record.step)
        flops = _products(node, costs[node.name].flops, sizes) * times
        yield Needed(node, flops)


def _again(program: Program, graph: fx.Graph, costs: NodeCosts) -> set[fx.Node]:
    """Products of what no update reaches with a weight that another product has, of as many tokens
    or more, but for its updates: these may be factors, and the product the same.
    """
    changed = descendants(before_step(program.graph).values())
    names, forms = {node.name for node in changed}, Forms(graph, with_rates=False)
    most: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if is_tint(node, linear_forward) and node.name in costs:
            x, base = argument(node, "x"), forms.of(argument(node, "weight")).base
            x = argument(x, "x") if is_tint(x, segment, kept_tokens) else x
            if x.name not in names and base is not None:
                most[x, base].append(node)
    found = {node for nodes in most.values() for node in nodes}
    return found - {max(nodes, key=lambda n: costs[n.name].flops) for nodes in most.values()}


def repeats(program: Program, phase: str | None, step: int | None) -> int:
    """How often a node of the graph runs: many steps are a loop over the nodes of one."""
    config = program.config
    once = phase is None or not config.looped or step == config.unrolled_steps
    return 1 if once else config.steps


def _descents(graph: fx.Graph, slot: str) -> list[fx.Node]:
    return [node for node in graph.nodes if _is_counted(node, {slot})]


def _is_counted(node: fx.Node, slots: set[str]) -> bool:
    """Whether it is the descent of a slot whose update has been counted, or of its state."""
    slot = info(node).slot or ""  # of a state: behind the last slash, which names may have too
    return is_tint(node, linear_descent) and (slot in slots or slot.rpartition("/")[0] in slots)


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
