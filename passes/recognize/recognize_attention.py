"""Causal self-attention, as one operator or written out, with whatever positions do to it.

    softmax(mask(cap(scale * rotated(q) rotated(k)^T + bias))) v, heads merged
    scaled_dot_product_attention of the same
      ->  tint.attention_forward(tint.rotary(q, cos, sin), tint.rotary(k, cos, sin), v, mask,
                                 bias, H, G, scale, softcap)

Operands are followed back to the layers that made them (`passes/analysis/heads.py`), scores from
the softmax to their product (`passes/analysis/scores.py`). Masks are evaluated: the simulator owns
them, so the graph gets an `attention_mask` input, narrowed by tint.window_mask for a sliding
window. Rotary tables and biases of keys become tables of positions; where their frequencies depend
on how many positions the call has, `tint.wave` makes them in every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tintc.ir.builder import Builder, operands, short_label
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.position import rotary, window_mask
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.coordinates import (
    BATCH,
    LENGTH,
    Untraceable,
    is_fixed,
    is_rearrangement,
    remembered,
)
from tintc.passes.analysis.evaluation import Evaluation, evaluated_length
from tintc.passes.analysis.frequencies import Wave, waves_of
from tintc.passes.analysis.heads import Heads, OfLength, Rotation, read_heads
from tintc.passes.analysis.patterns import (
    VIEWS,
    aten,
    calls,
    function_of,
    last_size,
    number,
    only_user,
    sizes,
    with_defaults,
)
from tintc.passes.analysis.scores import Looks, Scores, read_looks, read_scores
from tintc.passes.analysis.slots import take_rows
from tintc.passes.analysis.tables import read_table, read_wave

_Key = tuple[Any, ...]
Tables = tuple[Tensor, Tensor] | tuple[Wave, Wave]  # cos and sin


@dataclass
class _Known:
    """What layers share: masks and rotations that were looked at before."""

    looks: dict[_Key, Looks | Untraceable] = field(default_factory=dict)
    rotations: dict[_Key, Tables] = field(default_factory=dict)


@graph_pass(
    requires=("well_formed",),
    ensures=("well_formed",),
    writes=("max_positions", "max_tokens", "tables", "by_length"),
)
def recognize_attention(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. A refused match says why on its node."""
    known = _Known()
    for node in [
        n
        for n in graph.nodes
        if calls(n, aten.scaled_dot_product_attention, aten.softmax, aten._softmax)
    ]:
        try:
            _replace(graph, node, context, known)
        except Untraceable as reason:
            info(node).refused = str(reason)
    graph.eliminate_dead_code()
    return graph


def _replace(graph: fx.Graph, node: fx.Node, context: Context, known: _Known) -> None:
    if calls(node, aten.scaled_dot_product_attention):
        scores, values, product = _whole_operator(node)
    else:
        scores, values, product = _written_out(node, context)
    q, v = read_heads(scores.q, context), read_heads(values, context)
    k = read_heads(scores.k, context, axes="hwt" if scores.keys_last else "htw")
    if v.factor != 1 or v.rotation is not None:
        raise Untraceable(
            f"its values are {'rotated' if v.rotation else f'scaled by {v.factor:g}'}; expected "
            "them as a layer made them"
        )
    if q.groups != q.heads or v.groups != k.groups or q.heads % k.groups:
        raise Untraceable(
            f"it has {q.groups} different queries in {q.heads} heads, {k.groups} keys and "
            f"{v.groups} values; expected a query for each "
            "head, and as many keys as values, which divide the heads"
        )
    merged = _merged(product, q.heads * v.width, context)
    looks = _looks(scores, q.heads, context, known)
    build, module = Builder(graph), short_label(info(node).module)
    with graph.inserting_before(product):  # values may be projected behind the softmax
        turned = [
            _turned(build, heads, context, node, f"{module}_{name}", known)
            for heads, name in ((q, "q"), (k, "k"))
        ]
        mask = _mask(build, looks.window)
        bias = (
            None
            if looks.bias is None
            else read_table(build, context, looks.bias, "key_bias", node, wide=True)
        )
        scale = scores.scale * q.factor * k.factor
        args = (
            *turned,
            take_rows(build, v.root, v.rows),
            mask,
            bias,
            q.heads,
            k.groups,
            scale,
            scores.softcap,
        )
        new = build.call(
            attention_forward, *args, like=node, label=module, shape=("B", "T", last_size(merged))
        )
    merged.replace_all_uses_with(new)
    if calls(node, aten.scaled_dot_product_attention):
        _erase_between(
            graph, node, merged
        )  # fx holds sdpa for impure (it can drop probabilities) and would keep it as dead code


def _whole_operator(node: fx.Node) -> tuple[Scores, Any, fx.Node]:
    """(scores, values, the node that holds the result of each head)."""
    q, k, v, mask, dropout, is_causal = with_defaults(
        operands(node), None, None, None, None, 0.0, False
    )
    mask, is_causal = node.kwargs.get("attn_mask", mask), node.kwargs.get("is_causal", is_causal)
    if dropout:
        raise Untraceable("it drops probabilities even in eval mode")
    width = last_size(q)
    if width is None:
        raise Untraceable("its heads have no fixed width")
    scale = number(node.kwargs.get("scale"))
    scores = Scores(
        q, k, False, 1 / math.sqrt(width) if scale is None else scale, is_causal=bool(is_causal)
    )
    if isinstance(mask, fx.Node):
        is_bool = mask.meta["val"].dtype == torch.bool
        if is_bool:
            scores.hidden.append((mask, False, -math.inf))
        else:
            scores.offsets.append((mask, 1.0))
    return scores, v, node


def _written_out(softmax: fx.Node, context: Context) -> tuple[Scores, Any, fx.Node]:
    axis = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    if axis not in (-1, len(sizes(softmax)) - 1):
        raise Untraceable(f"it is a softmax over axis {axis}; expected the last, over the keys")
    probabilities = softmax
    while (user := only_user(probabilities)) is not None and calls(user, *VIEWS):
        probabilities = user
    if user is None or not calls(user, aten.matmul, aten.bmm) or user.args[0] is not probabilities:
        raise Untraceable("its probabilities are not multiplied with values")
    return read_scores(softmax, context), user.args[1], user


def _merged(product: fx.Node, width: int, context: Context) -> fx.Node:
    """The (B, T, H * E) value with the heads' results side by side, found by laying out the numbers
    of its coordinates.
    """
    values = Evaluation(BATCH, LENGTH, context)
    wanted = torch.arange(BATCH * LENGTH * width).view(BATCH, LENGTH, width)
    by_head = torch.unflatten(wanted, -1, (-1, int(sizes(product)[-1]))).transpose(1, 2)
    value: Tensor = by_head if len(sizes(product)) == 4 else by_head.flatten(0, 1)
    node = product
    while not (value.shape == wanted.shape and torch.equal(value, wanted)):
        user = only_user(node)
        if (
            user is None
            or not is_rearrangement(user)
            or not is_fixed(user)
            or user.args[0] is not node
        ):
            raise Untraceable("its heads are not merged into (batch, tokens, heads * width)")
        target = function_of(user)
        args, kwargs = values.of((operands(user)[1:], user.kwargs))
        value, node = target(value, *args, **kwargs), user
    return node


def _looks(scores: Scores, heads: int, context: Context, known: _Known) -> Looks:
    key = (tuple(scores.offsets), tuple(scores.hidden), scores.is_causal, heads)
    return remembered(known.looks, key, lambda: read_looks(scores, heads, context))


def _turned(
    build: Builder, heads: Heads, context: Context, like: fx.Node, label: str, known: _Known
) -> fx.Node:
    """The operand, behind its rotation."""
    x = take_rows(build, heads.root, heads.rows)
    if heads.rotation is None:
        return x
    key = heads.rotation.key()
    if key not in known.rotations:
        known.rotations[key] = _tables(heads.rotation, context)
    cos, sin = known.rotations[key]
    rows = [
        read_table(build, context, table, name, like)
        if isinstance(table, Tensor)
        else read_wave(build, context, table, name, like)
        for table, name in ((cos, "rotary_cos"), (sin, "rotary_sin"))
    ]
    return build.call(
        rotary,
        x,
        *rows,
        heads.groups,
        heads.rotation.pairing,
        False,
        like=like,
        label=f"{label}_rotary",
    )


def _tables(rotation: Rotation, context: Context) -> Tables:
    try:
        return rotation.tables(evaluated_length(context), context)
    except OfLength as reason:
        found = waves_of(rotation, reason.longest, context)
        context.limit_positions(reason.longest)
        return found


def _mask(build: Builder, window: int) -> fx.Node:
    mask = build.input("attention_mask")
    if window == 0:
        return mask
    same = [
        user
        for user in mask.users
        if is_tint(user, window_mask) and argument(user, "window") == window
    ]
    return same[0] if same else build.call(window_mask, mask, window, label=f"window_{window}")


def _erase_between(graph: fx.Graph, first: fx.Node, last: fx.Node) -> None:
    chain = [first]
    while chain[-1] is not last:
        chain.append(next(iter(chain[-1].users)))
    for dead in reversed(chain):
        graph.erase_node(dead)
