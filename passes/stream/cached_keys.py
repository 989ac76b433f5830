"""Attention also reads keys and values of earlier tokens, which the caller gives.

    attention_forward(q, k, v, mask, bias)
      ->  attention_forward(q, with_past(k_past, k), with_past(v_past, v), mask, ...)
    dk, dv of attention_backward_...  ->  own_tokens(dk, k), own_tokens(dv, v)
    outputs: cache = {name: k, v, bias of the first forward pass}

Keys are cached as attention reads them: turned by their positions, before they are shared by groups
of heads. What is past is constant for the gradient and for all steps on one window. The mask that
the caller gives is (B, 1, T, C), C = P + T.

Where nothing is trained the cache is returned with what was past, and of attention in a window of w
tokens the caller keeps w - 1: that one's past has "Pw" columns, and its mask loses those in front.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx

from tintc.ir.builder import Builder, reinfer
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
    last_keys,
    own_tokens,
    with_past,
)
from tintc.ir.ops.position import past_window_mask, window_mask
from tintc.ir.outputs import Output
from tintc.ir.pass_manager import graph_pass
from tintc.ir.precision import wide_dtype

_BACKWARD = (attention_backward_value, attention_backward_full)
_CACHED = ("k", "v", "bias")


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def cached_keys(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    build, returned = Builder(graph), {}
    bounded = {} if context.choices.window else _windows(graph)
    past: dict[str, fx.Node] = {}
    joined: dict[fx.Node, fx.Node] = {}
    for value, (name, first) in _read_by_attention(graph).items():
        if name not in past:
            past[name] = _past(build, name, first, bounded.get(value))
            returned[name] = first
        joined[value] = _join(build, past[name], value)
        if not context.choices.window:
            returned[name] = joined[value]
    for mask, reader in _read_masks(graph, bounded, joined).items():
        _shorten(build, mask, reader)
    for node in list(graph.nodes):
        if is_tint(node, attention_forward, *_BACKWARD):
            node.args = fx.node.map_arg(node.args, lambda n: joined.get(n, n))
    for node in list(graph.nodes):
        if is_tint(node, *_BACKWARD):
            _cut_gradients(build, node)
        elif is_tint(node, window_mask):
            _widen(build, node)
        elif node.op == "placeholder" and node.name == "attention_mask":
            copy_info(node, node, shape=(*info(node).shape[:-1], "C"))
    output = graph.output_node()
    outputs: Any = output.args[0]
    if Output.CACHE in outputs:
        output.args = ({**outputs, Output.CACHE.value: returned},)
    return reinfer(graph)


def cached_values(graph: fx.Graph) -> dict[str, fx.Node]:
    """Name -> a value of the first forward pass that later windows read, (B, T, ...)."""
    return dict(_read_by_attention(graph).values())


def cached_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of such a value, in a simulator of that dtype. Biases of scores grow with the position: half
    precision would lose their differences.
    """
    return wide_dtype(dtype) if name.endswith("/bias") else dtype


def _read_by_attention(graph: fx.Graph) -> dict[fx.Node, tuple[str, fx.Node]]:
    """What attention reads of every token -> (its name, the same of the first forward pass)."""
    counts: Counter[tuple[str, int | None]] = Counter()
    first: dict[tuple[str, int], fx.Node] = {}
    found: dict[fx.Node, tuple[str, fx.Node]] = {}
    for node in graph.nodes:
        if not is_tint(node, attention_forward):
            continue
        place = info(node).module, info(node).step
        of_layer = info(node).module, counts[place]  # the how manieth of its module
        counts[place] += 1
        original = first.setdefault(of_layer, node)
        for name in _CACHED:
            value, before = argument(node, name), argument(original, name)
            if value is not None:
                named = found.get(before, (f"cache/{original.name}/{name}", before))
                found.setdefault(value, named)
    return found


def _past(build: Builder, name: str, of: fx.Node, window: int | None) -> fx.Node:
    """A further input: the value at earlier tokens."""
    batch, _, *rest = info(of).shape
    past = build.placeholder(f"{of.name}_past", (batch, f"P{window or ''}", *rest))
    copy_info(of, past, role="input", slot=name, shape=info(past).shape, gradient=None)
    return past


def _windows(graph: fx.Graph) -> dict[fx.Node, int]:
    """What only attention in one window reads -> the window. Such attention reads nothing else, nor
    does anybody else read its mask.
    """
    readers = [node for node in graph.nodes if is_tint(node, attention_forward)]
    seen: dict[fx.Node, set[fx.Node]] = {}
    for node in readers:
        for value in _cached_arguments(node):
            seen.setdefault(value, set()).add(argument(node, "mask"))
    alone = {value for value, masks in seen.items() if len(masks) == 1}
    shared = {
        argument(node, "mask") for node in readers if not alone.issuperset(_cached_arguments(node))
    }
    return {
        value: argument(mask, "window")
        for value in alone
        if is_tint(mask := next(iter(seen[value])), window_mask) and mask not in shared
    }


def _cached_arguments(node: fx.Node) -> list[fx.Node]:
    return [value for name in _CACHED if (value := argument(node, name)) is not None]


def _read_masks(
    graph: fx.Graph, bounded: dict[fx.Node, int], joined: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """The mask of each window -> keys of one who reads it."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if is_tint(node, attention_forward) and (k := argument(node, "k")) in bounded:
            found.setdefault(argument(node, "mask"), joined[k])
    return found


def _shorten(build: Builder, mask: fx.Node, keys: fx.Node) -> None:
    """The window's mask is of the keys that are still there: it stands behind these."""
    with build.graph.inserting_after(keys):
        last = build.call(
            last_keys, argument(mask, "mask"), keys, like=mask, label=f"{mask.name}_last",
            shape=(*info(mask).shape[:-1], info(keys).shape[1]),
        )  # fmt: skip
    with build.graph.inserting_after(last):
        near = build.graph.node_copy(mask, lambda n: last)
    copy_info(mask, near, shape=info(last).shape)
    mask.replace_all_uses_with(near)
    build.graph.erase_node(mask)


def _join(build: Builder, past: fx.Node, value: fx.Node) -> fx.Node:
    with build.graph.inserting_after(value):
        place = {"phase": info(value).phase, "step": info(value).step}
        return build.call(
            with_past, past, value, like=value, label=f"{value.name}_with_past", **place
        )


def _cut_gradients(build: Builder, node: fx.Node) -> None:
    """Of keys and values, those of the window's own tokens remain."""
    items = [node]
    if is_tint(node, attention_backward_full):
        items = [n for n in node.users if n.target is operator.getitem and n.args[1] != 0]
    for item in items:
        with build.graph.inserting_after(item):
            place = {"phase": info(item).phase, "step": info(item).step}
            own = build.call(
                own_tokens, item, argument(node, "q"), like=item, label=f"{item.name}_own",
                shape=info(argument(node, "q")).shape, **place,
            )  # fmt: skip
        item.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)  # noqa: B023


def _widen(build: Builder, node: fx.Node) -> None:
    with build.graph.inserting_before(node):
        wide = build.call(
            past_window_mask, *node.args, like=node, label=node.name, shape=info(node).shape
        )
    node.replace_all_uses_with(wide)
    build.graph.erase_node(node)
