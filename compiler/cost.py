"""FLOPs and bytes of a lowered program, from shapes alone.

FLOPs count a multiplication and an addition as two and matrix products only (linear layers, attention, the
head): norms, activations and softmax are below 1 % of them. Peak memory is a walk over the graph in program
order: weights, plus every value from where it is made to its last use, plus what each operator holds inside
(`_inside`; tests/compiler/test_cost.py measures both). Only what the logits need counts. B, T and S (batch,
tokens, training segment) are given.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from tintc.compiler.builder import ancestors, outputs
from tintc.compiler.dialect import argument, is_tint, tint_name
from tintc.compiler.node_meta import Shape, info

_VIEWS = ("prefix", "segment", "segment_mask")


@dataclass(frozen=True)
class Cost:
    """flops: of one call. weight_bytes: of the auxiliary weights. peak_bytes: weights and the most that is live at once."""

    flops: int
    weight_bytes: int
    peak_bytes: int


def estimate(graph: fx.Graph, *, batch: int, tokens: int, segment: int, bytes_per_number: int) -> Cost:
    """Cost of one call that returns the logits (not the initial ones)."""
    sizes = {"B": batch, "T": tokens, "S": segment}
    needed = _needed(graph)
    flops = sum(_flops(node, sizes) for node in needed if tint_name(node))
    weights = sum(_count(info(n).shape, sizes) for n in graph.nodes if info(n).role == "parameter") * bytes_per_number
    return Cost(flops, weights, weights + _peak(graph, needed, sizes, bytes_per_number))


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the logits depend on, in program order."""
    needed = ancestors([outputs(graph)["logits"]])
    return [node for node in graph.nodes if node in needed]


def _count(shape: Shape, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[size] if isinstance(size, str) else size for size in shape)


def _flops(node: fx.Node, sizes: Mapping[str, int]) -> int:
    if is_tint(node, "linear_forward"):
        return 2 * _count(info(node).shape, sizes) * _last(argument(node, "x"))
    if is_tint(node, "linear_backward"):
        return 2 * _count(info(node).shape, sizes) * _last(argument(node, "dy"))
    if is_tint(node, "linear_descent"):
        return 2 * _count(info(argument(node, "dy")).shape, sizes) * _last(argument(node, "x"))
    products = {"attention_forward": 2, "attention_backward_value": 2, "attention_backward_full": 5}.get(tint_name(node) or "")
    if products is None:
        return 0
    query = info(argument(node, "q")).shape
    return products * 2 * _count(query, sizes) * _count((query[-2],), sizes)


def _last(node: fx.Node) -> int:
    size = info(node).shape[-1]
    assert isinstance(size, int)
    return size


def _peak(graph: fx.Graph, needed: list[fx.Node], sizes: Mapping[str, int], width: int) -> int:
    order = {node: i for i, node in enumerate(needed)}
    storage = {node: _storage(node) for node in needed}
    last_use = {storage[outputs(graph)["logits"]]: len(needed)}
    for node in needed:
        for source in (node, *node.all_input_nodes):
            last_use[storage[source]] = max(last_use.get(storage[source], 0), order[node])
    dying: dict[int, list[fx.Node]] = {}
    for node, last in last_use.items():
        dying.setdefault(last, []).append(node)
    live = peak = 0
    for node in needed:
        owns = storage[node] is node and node.op == "call_function"
        live += _bytes(node, sizes, width) if owns else 0
        peak = max(peak, live + _inside(node, sizes, width))
        live -= sum(_bytes(dead, sizes, width) for dead in dying.get(order[node], []) if dead.op == "call_function")
    return peak


def _storage(node: fx.Node) -> fx.Node:
    """The node whose memory this one's value lies in."""
    while is_tint(node, *_VIEWS) or node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _bytes(node: fx.Node, sizes: Mapping[str, int], width: int) -> int:
    shape: Any = info(node).shape
    parts = shape if shape and isinstance(shape[0], tuple) else (shape,)
    per_number = {"float": width, "int": 8, "bool": 1}[info(node).dtype]
    return sum(_count(part, sizes) for part in parts) * per_number


def _inside(node: fx.Node, sizes: Mapping[str, int], width: int) -> int:
    """Bytes that an operator of `runtime/primitives` holds at its worst moment besides its arguments and results.

    Half precision (`width` 2) computes norms, activations and softmax in float32 (`wide` 4).
    """
    wide = max(width, 4)
    count = _count(info(node).shape, sizes) if not is_tint(node, "attention_backward_full") else 0
    match tint_name(node):
        case "attention_forward":
            return _count(info(argument(node, "mask")).shape, sizes) * width  # torch makes numbers of the boolean mask
        case "attention_backward_value":
            return _probabilities(node, sizes) * 2 * wide
        case "attention_backward_full":
            return _probabilities(node, sizes) * max(3 * width, 2 * wide)
        case "loss_gradient":
            return count * 2 * (wide - width)
        case "norm_backward":
            return count * (5 * wide - width)
        case "activation_backward":
            plain = argument(node, "kind") == "relu" or (argument(node, "gradient") == "first_order" and width == 8)
            return count * ((3 if plain else 5) * wide - width)
        case "norm_descent":
            return _count(info(argument(node, "x")).shape, sizes) * 2 * wide
        case "linear_descent":
            return _count(info(argument(node, "dy")).shape, sizes) * width
        case _:
            return 0


def _probabilities(node: fx.Node, sizes: Mapping[str, int]) -> int:
    query = info(argument(node, "q")).shape
    return _count((query[0], argument(node, "heads"), query[1], query[1]), sizes)
