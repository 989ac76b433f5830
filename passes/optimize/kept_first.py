"""Takes the kept positions first, and computes at these alone what nobody reads at others.

    kept_tokens(f(x, W))             ->  f(kept_tokens(x), W)          f: goes token by token
    kept_tokens(attention(q, k, v))  ->  attention(kept_tokens(q), k, v)
    g(spread_tokens(dy), x, W)       ->  spread_tokens(g(dy, kept_tokens(x), W))
    descent(W, spread_tokens(dy), x) ->  descent(W, dy, kept_tokens(x))
    attention_backward(spread_tokens(do), q, ...)  ->  attention_backward(do, kept_tokens(q), ...)

So where logits are wanted at some positions, the last block computes nothing but keys and values at
the others, and blocks below it all that these keys and values need. Where loss stands at some
positions (a window of a stream), the way back through the last block begins at these. Safe because
a value that only `kept_tokens` reads is read nowhere else, and because the way back of 0 is 0.
"""

from __future__ import annotations

import operator

from torch import fx

from tintc.ir.builder import remove_dead
from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, argument, is_tint, operator_of, with_arguments
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_backward, activation_forward
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
)
from tintc.ir.ops.elementwise import multiply, residual, scale
from tintc.ir.ops.embedding import (
    embedding,
    embedding_descent,
    kept_tokens,
    spread_tokens,
    without_padding,
)
from tintc.ir.ops.linear import bias_descent, linear_backward, linear_descent, linear_forward
from tintc.ir.ops.low_rank import low_rank, low_rank_of_scores
from tintc.ir.ops.norm import norm_backward, norm_descent, norm_forward
from tintc.ir.ops.position import rotary, wave
from tintc.ir.ops.rates import token_products
from tintc.ir.ops.states import linear_square
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.kept import Kept

# The arguments that have a value for every token of the result.
_TOKEN_BY_TOKEN: dict[AnyOperator, tuple[str, ...]] = {
    linear_forward: ("x",),
    norm_forward: ("x",),
    activation_forward: ("x",),
    residual: ("x", "y"),
    multiply: ("x", "y"),
    scale: ("x",),
    rotary: ("x", "cos", "sin"),
    wave: ("positions",),
    embedding: ("index",),
    low_rank: ("y", "x"),
    low_rank_of_scores: ("y", "scores"),
    token_products: ("x",),
}
# The same of what gives 0 where the gradient is 0, and of what adds over tokens.
_BACK: dict[AnyOperator, tuple[str, ...]] = {
    linear_backward: ("dy",),
    norm_backward: ("dy", "x"),
    activation_backward: ("dy", "x"),
    multiply: ("x", "y"),
    scale: ("x",),
    rotary: ("x", "cos", "sin"),
    without_padding: ("dy", "index"),
}
_ADDED_UP: dict[AnyOperator, tuple[str, ...]] = {
    linear_descent: ("dy", "x"),
    bias_descent: ("dy",),
    norm_descent: ("dy", "x"),
    embedding_descent: ("dy", "index"),
    linear_square: ("dy", "x"),
}
_ATTENTION_BACK = (attention_backward_value, attention_backward_full)


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def kept_first(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    if context.choices.window and context.choices.cached:
        return graph  # a window's own tokens are all kept
    positions: dict[fx.Node, None] = {
        argument(node, "kept"): None
        for node in graph.nodes
        if is_tint(node, kept_tokens, spread_tokens)
    }
    for each in positions:
        kept = Kept(graph, each)
        for node in list(graph.nodes):
            _narrow_back(kept, node)
        remove_dead(graph)
        kept = Kept(graph, each)
        for node in reversed(list(graph.nodes)):
            _narrow_forward(kept, node)
    remove_dead(graph)
    return graph


def _is_kept(node: fx.Node, kept: Kept) -> bool:
    return is_tint(node, kept_tokens) and argument(node, "kept") is kept.positions


def _narrow_forward(kept: Kept, node: fx.Node) -> None:
    """A value that is read at the kept positions alone is made there alone."""
    called = operator_of(node)
    readers = list(node.users)
    if called is None or not readers or not all(_is_kept(n, kept) for n in readers):
        return
    changed: dict[str, fx.Node] = {}
    if called in _TOKEN_BY_TOKEN:
        changed = {name: kept.of(argument(node, name)) for name in _TOKEN_BY_TOKEN[called]}
    elif called is attention_forward and argument(node, "mask") is not None:
        changed = _queries(kept, node, "q")
    if changed:
        narrow = _copy(kept, node, changed)
        for reader in readers:
            reader.replace_all_uses_with(narrow)
            kept.build.graph.erase_node(reader)
        kept.made[node] = narrow
        kept.build.graph.erase_node(node)


def _narrow_back(kept: Kept, node: fx.Node) -> None:
    """What reads a gradient that is 0 outside the kept positions."""
    called = operator_of(node)
    spreads = [n for n in node.all_input_nodes if _is_spread(n, kept)]
    if called is None or not spreads:
        return
    if called in _ADDED_UP and _is_spread(argument(node, "dy"), kept):
        names = _ADDED_UP[called]
        node.replace_all_uses_with(
            _copy(kept, node, {name: kept.of(argument(node, name)) for name in names})
        )
    elif called in _BACK or (called is residual and len(spreads) == len(node.all_input_nodes)):
        names = _BACK.get(called, ("x", "y"))
        narrow = _copy(kept, node, {name: kept.of(argument(node, name)) for name in names})
        node.replace_all_uses_with(_spread(kept, narrow, node, argument(spreads[0], "like")))
    elif called in _ATTENTION_BACK and _is_spread(argument(node, "do"), kept):
        _narrow_attention(kept, node)


def _is_spread(node: fx.Node, kept: Kept) -> bool:
    return is_tint(node, spread_tokens) and argument(node, "kept") is kept.positions


def _narrow_attention(kept: Kept, node: fx.Node) -> None:
    """dk and dv stay those of all tokens; dq is 0 where do is."""
    if argument(node, "mask") is None:
        return
    like = argument(argument(node, "do"), "like")
    items = [n for n in node.users if n.target is operator.getitem]
    narrow = _copy(kept, node, _queries(kept, node, "do", "q"))
    if not items:
        node.replace_all_uses_with(narrow)
    for item in items:
        with kept.build.graph.inserting_before(item):
            made = kept.build.item(narrow, item.args[1], f"{item.name}_kept")  # type: ignore[arg-type]
        item.replace_all_uses_with(_spread(kept, made, item, like) if item.args[1] == 0 else made)


def _queries(kept: Kept, node: fx.Node, *names: str) -> dict[str, fx.Node]:
    return {
        "mask": kept.queries(argument(node, "mask")),
        **{name: kept.of(argument(node, name)) for name in names},
    }


def _copy(kept: Kept, node: fx.Node, changed: dict[str, fx.Node]) -> fx.Node:
    """The same call of other arguments, in front of the node."""
    called = operator_of(node)
    assert called is not None
    record = info(node)
    with kept.build.graph.inserting_before(node):
        return kept.build.call(
            called, *with_arguments(node, changed), like=node, label=f"{node.name}_at_kept",
            phase=record.phase, step=record.step, slot=record.slot,
        )  # fmt: skip


def _spread(kept: Kept, narrow: fx.Node, node: fx.Node, like: fx.Node) -> fx.Node:
    """like: a number of every token."""
    record = info(node)
    with kept.build.graph.inserting_before(node):
        return kept.build.call(
            spread_tokens, narrow, kept.positions, like, like=node, label=f"{node.name}_spread",
            phase=record.phase, step=record.step,
        )  # fmt: skip
