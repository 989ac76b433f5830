"""Causal self-attention.

    sdpa(heads(q * c), heads(k), heads(v), mask, scale=s) -> transpose -> merge heads
      ->  tint.attention_forward(q, k, v, attention_mask, H, G, c * s)

heads(x) is view(x, [B, T, H, E]) and transpose(1, 2). The mask is evaluated, not matched: it must be the causal
one for every length up to the model's positions (or 4096, which then is the simulator's limit). The simulator
owns masks, so the graph gets an `attention_mask` input in its place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from tintc.compiler.builder import Builder, operands, short_label
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass
from tintc.passes.patterns import (
    VIEWS,
    aten,
    calls,
    depends_on,
    evaluate,
    is_parameter,
    last_size,
    number,
    only_user,
    reads_token_values,
    sizes,
    with_defaults,
)

_LONGEST_MASK = 4096  # masks are evaluated up to this length; nothing is claimed of longer sequences


@graph_pass(requires=("well_formed",), ensures=("well_formed",))
def recognize_attention(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. A refused match says why on its node."""
    causal: dict[tuple[fx.Node | None, bool], str] = {}  # (mask, is_causal) -> problem; layers share masks
    for node in [n for n in graph.nodes if calls(n, aten.scaled_dot_product_attention)]:
        info(node).refused = _replace(graph, node, context, causal)
    graph.eliminate_dead_code()
    return graph


def _replace(graph: fx.Graph, node: fx.Node, context: Context, causal: dict[tuple[fx.Node | None, bool], str]) -> str:
    query, keys, values, mask, dropout, is_causal = with_defaults(operands(node), None, None, None, None, 0.0, False)
    mask, is_causal = node.kwargs.get("attn_mask", mask), node.kwargs.get("is_causal", is_causal)
    if dropout:
        return "it drops probabilities even in eval mode"
    split = [_heads(x) for x in (query, keys, values)]
    heads = [found for found in split if not isinstance(found, str)]
    if len(heads) < 3:
        return next(found for found in split if isinstance(found, str))
    (q, c_q, h, width), (k, c_k, g, _), (v, c_v, g_v, _) = heads
    merged = _merged(node)
    if merged is None or g != g_v or c_v != 1 or h % g:
        return "its heads are not split and merged as view and transpose of (batch, tokens, heads * width)"
    key = (mask, bool(is_causal))
    if key not in causal:
        causal[key] = _mask_problem(*key, context)
    if causal[key]:
        return causal[key]
    scale = number(node.kwargs.get("scale"))
    scale = (1 / math.sqrt(width) if scale is None else scale) * c_q * c_k
    with graph.inserting_before(node):
        build = Builder(graph)
        args = (q, k, v, build.input("attention_mask"), h, g, scale)
        label, shape = short_label(info(node).module), ("B", "T", last_size(merged))
        new = build.call("attention_forward", *args, like=node, label=label, shape=shape)
    merged.replace_all_uses_with(new)
    # fx holds sdpa for impure (it can drop probabilities) and would keep it as dead code.
    for dead in (merged, merged.args[0], node):
        graph.erase_node(dead)  # type: ignore[arg-type]
    return ""


def _heads(node: Any) -> tuple[fx.Node, float, int, int] | str:
    """(x, factor, heads, head width) where the node is factor * heads(x), scaled at any point; else why not."""
    transposed, outer = _unscaled(node)
    if not _swaps_heads_and_tokens(transposed):
        return f"it reads {_what(transposed)}; expected a transpose of heads and tokens"
    view, middle = _unscaled(transposed.args[0])
    if not calls(view, *VIEWS) or len(sizes(view)) != 4 or len(sizes(view.args[0])) != 3:
        return f"it reads {_what(view)}; expected a view of (batch, tokens, heads * width) as (batch, tokens, heads, width)"
    tokens = next(n for n in view.graph.nodes if info(n).role == "input" and n.name == "input_ids")
    if [str(size) for size in sizes(view)[:2]] != [str(size) for size in sizes(tokens)]:
        return "it views tokens as batch or the other way round"
    x, inner = _unscaled(view.args[0])
    heads, width = sizes(view)[2:]
    if not isinstance(heads, int) or last_size(x) != heads * width:
        return f"it splits {last_size(x)} numbers into {heads} heads of {width}"
    return x, outer * middle * inner, heads, width


def _unscaled(node: Any) -> tuple[Any, float]:
    """The node without multiplications and divisions by numbers, and their product."""
    factor = 1.0
    while calls(node, aten.mul, aten.div) and len(node.args) == 2 and not node.kwargs and (scale := number(node.args[1])) is not None:
        factor = factor * scale if calls(node, aten.mul) else factor / scale
        node = node.args[0]
    return node, factor


def _swaps_heads_and_tokens(node: Any) -> bool:
    if calls(node, aten.transpose):
        return sorted(axis % 4 for axis in node.args[1:]) == [1, 2]
    return calls(node, aten.permute) and list(node.args[1]) == [0, 2, 1, 3]


def _what(node: Any) -> str:
    return str(getattr(node, "target", node))


def _merged(node: fx.Node) -> fx.Node | None:
    """The (B, T, H * E) view of the transposed result."""
    transpose = only_user(node)
    if transpose is None or not _swaps_heads_and_tokens(transpose):
        return None
    view = only_user(transpose)
    return view if view is not None and calls(view, *VIEWS) and len(sizes(view)) == 3 else None


def _mask_problem(mask: fx.Node | None, is_causal: bool, context: Context) -> str:
    """Why the mask is not the causal one; empty if it is."""
    if mask is None:
        return "" if is_causal else "it is not causal: every position sees every other"
    if depends_on(mask, lambda n: is_parameter(n)):
        return "its mask or bias depends on a weight"
    if reads_token_values(mask):
        return "its mask depends on the token ids"
    longest = min(context.facts.max_positions or _LONGEST_MASK, _LONGEST_MASK)
    for batch, length in ((2, min(7, longest)), (1, longest)):
        try:
            value = evaluate(mask, batch, length, context)
        except (RuntimeError, TypeError, KeyError, IndexError) as error:
            return f"its mask cannot be evaluated from the sizes alone ({error})"
        if not _is_causal(value, length):
            return "its mask is not the plain causal one (a window, a bias or a prefix)"
    context.facts.max_positions = longest
    return ""


def _is_causal(mask: Tensor, length: int) -> bool:
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if mask.shape[-2:] != causal.shape:
        return False
    if mask.dtype == torch.bool:
        return bool((mask == causal).all())
    hidden = torch.finfo(mask.dtype).min / 2
    return bool(((mask == 0) == causal).all()) and bool((mask[..., ~causal] < hidden).all())
