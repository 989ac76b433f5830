"""Norms over the last dimension, as one operator or written out, and learned scales.

    layer_norm(x, [D], gamma, beta, eps); rms_norm(x, [D], gamma, eps)
      ->  tint.norm_forward(x, gamma, beta, eps, kind, 1, 0)
    x * rsqrt(mean(x^2) + eps) * gamma; the same with x - mean(x) for x
      ->  kind "rms"; kind "layer"
    ... * (1 + gamma)
      ->  offset 1
    a norm of each head of a product
      ->  H pieces that share gamma
    gamma * x
      ->  kind "scale"

gamma and beta are read through prefix slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tintc.ir.builder import Builder, input_node, operands, short_label
from tintc.ir.context import Context
from tintc.ir.layout import Rows
from tintc.ir.node_meta import info
from tintc.ir.ops.norm import norm_forward
from tintc.ir.pass_manager import graph_pass
from tintc.ir.precision import wide
from tintc.passes.analysis.coordinates import Untraceable
from tintc.passes.analysis.evaluation import constant, is_positional, is_weight
from tintc.passes.analysis.heads import Heads, read_heads
from tintc.passes.analysis.patterns import (
    aten,
    binary,
    calls,
    is_parameter,
    is_whole,
    last_size,
    number,
    only_user,
    sizes,
    with_defaults,
)
from tintc.passes.analysis.slots import read_slot, take_rows


@dataclass(frozen=True)
class _Norm:
    """result: the node that the norm ends in."""

    x: Any
    result: fx.Node
    kind: str
    eps: float
    gamma: fx.Node | None = None
    beta: fx.Node | None = None
    offset: float = 0.0


@graph_pass(
    requires=("well_formed",), ensures=("well_formed",), reads=("max_positions", "max_tokens")
)
def recognize_norm(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. A gain or shift that is missing stays None."""
    for match in (_one_operator, _written_out, _learned_scale):
        for node in list(graph.nodes):
            found = match(node, context)
            if isinstance(found, str):
                info(node).refused = found
            elif found is not None:
                try:
                    _replace(graph, found, context)
                except Untraceable as reason:
                    info(
                        node
                    ).refused = (
                        f"what it normalises is no whole activation nor all heads of one: {reason}"
                    )
        graph.eliminate_dead_code()
    return graph


def _one_operator(node: fx.Node, context: Context) -> _Norm | str | None:
    if calls(node, aten.layer_norm):
        x, width, gamma, beta, eps = with_defaults(operands(node), None, None, None, None, 1e-5)
        kind = "layer"
    elif calls(node, aten.rms_norm):
        x, width, gamma, eps = with_defaults(operands(node), None, None, None, None)
        beta, kind = None, "rms"
        eps = (
            torch.finfo(wide(torch.empty(0, dtype=node.meta["val"].dtype)).dtype).eps
            if eps is None
            else eps
        )  # torch norms in float32
    else:
        return None
    gain, offset = (None, 0.0) if gamma is None else _gain(gamma, context)
    if (
        len(width) != 1
        or (gain is None) != (gamma is None)
        or not (beta is None or is_parameter(beta))
    ):
        return "it normalises several dimensions, or its gain or shift is computed"
    norm = _Norm(x, node, kind, eps, gain, beta, offset)
    return _with_gain(norm, context) if gain is None and beta is None else norm


def _written_out(node: fx.Node, context: Context) -> _Norm | None:
    """From x * rsqrt(variance + eps), x / sqrt(...) or x * (...)^-1/2 on, through a gain and a
    shift.
    """
    for centered, inverse in (
        *binary(node, aten.mul),
        *([operands(node)] if calls(node, aten.div) and len(node.args) == 2 else []),
    ):
        shifted = _under_root(inverse, divided=calls(node, aten.div))
        for variance, eps in binary(shifted, aten.add):
            value = constant(eps, context)
            if value is not None and _is_mean_square(variance, centered):
                x = _uncentered(centered)
                return _with_gain(
                    _Norm(
                        centered if x is None else x, node, "rms" if x is None else "layer", value
                    ),
                    context,
                )
            if value is not None and calls(variance, aten.var) and _is_variance(variance, centered):
                return _with_gain(_Norm(_uncentered(centered), node, "layer", value), context)
    return None


def _under_root(node: Any, *, divided: bool) -> Any:
    if divided:
        return (
            node.args[0]
            if calls(node, aten.sqrt) or (calls(node, aten.pow) and number(node.args[1]) == 0.5)
            else None
        )
    if calls(node, aten.rsqrt) or (calls(node, aten.pow) and number(node.args[1]) == -0.5):
        return node.args[0]
    return (
        node.args[0].args[0]
        if calls(node, aten.reciprocal) and calls(node.args[0], aten.sqrt)
        else None
    )


def _is_mean_square(node: Any, x: Any) -> bool:
    """mean(x^2, -1, keepdim)."""
    if not _is_mean(node):
        return False
    square = node.args[0]
    if calls(square, aten.pow):
        return square.args[0] is x and number(square.args[1]) == 2
    return (calls(square, aten.square) and square.args[0] is x) or (
        calls(square, aten.mul) and tuple(square.args) == (x, x)
    )


def _is_variance(node: fx.Node, centered: Any) -> bool:
    """var(x, -1, correction 0, keepdim), where `centered` is x - mean(x)."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    unbiased = (
        node.args[2]
        if len(node.args) > 2
        else node.kwargs.get("correction", node.kwargs.get("unbiased", 1))
    )
    keeps = node.args[3] if len(node.args) > 3 else node.kwargs.get("keepdim", False)
    x = _uncentered(centered)
    return (
        x is not None
        and node.args[0] in (x, centered)
        and axes in ([-1], -1)
        and not unbiased
        and bool(keeps)
    )


def _uncentered(node: Any) -> Any:
    """x where the node is x - mean(x, -1, keepdim), else None."""
    if not calls(node, aten.sub) or len(node.args) != 2 or not _is_mean(node.args[1]):
        return None
    return node.args[0] if node.args[1].args[0] is node.args[0] else None


def _is_mean(node: Any) -> bool:
    """mean(x, -1, keepdim)."""
    if not calls(node, aten.mean) or len(node.args) < 3 or node.args[2] is not True:
        return False
    return list(node.args[1]) in ([-1], [len(sizes(node)) - 1])


def _with_gain(norm: _Norm, context: Context) -> _Norm:
    """Goes on through gamma * y or (c + gamma) * y, and y + beta."""
    width = (last_size(norm.result),)
    user = only_user(norm.result)
    for y, gain in () if user is None else binary(user, aten.mul):
        gamma, offset = _gain(gain, context)
        if y is norm.result and gamma is not None and info(gamma).shape == width:
            norm = _Norm(norm.x, user, norm.kind, norm.eps, gamma, None, offset)  # type: ignore[arg-type]
            break
    user = only_user(norm.result)
    for y, beta in () if user is None else binary(user, aten.add):
        if y is norm.result and is_parameter(beta) and info(beta).shape == width:
            return _Norm(norm.x, user, norm.kind, norm.eps, norm.gamma, beta, norm.offset)  # type: ignore[arg-type]
    return norm


def _gain(node: Any, context: Context) -> tuple[fx.Node | None, float]:
    """(gamma, c) where the node is gamma or gamma + c."""
    if is_parameter(node):
        return node, 0.0
    for gamma, offset in binary(node, aten.add):
        if is_parameter(gamma) and (value := constant(offset, context)) is not None:
            return gamma, value
    return None, 0.0


def _learned_scale(node: fx.Node, context: Context) -> _Norm | None:
    for x, gamma in binary(node, aten.mul):
        of_tokens = (
            isinstance(x, fx.Node)
            and not is_positional(x)
            and not is_weight(x)
            and len(sizes(x)) == 3
        )
        if of_tokens and is_weight(gamma) and info(gamma).shape == (last_size(x),):
            return _Norm(x, node, "scale", 0.0, gamma)
    return None


def _replace(graph: fx.Graph, norm: _Norm, context: Context) -> None:
    """Puts the norm behind the activation that x is a view of, and the result back into x's
    layout.
    """
    build, node = Builder(graph), norm.result
    if len(sizes(node)) not in (3, 4):
        raise Untraceable(f"a value of {len(sizes(node))} axes")
    flat = len(sizes(node)) == 3
    if flat and not is_whole(node):
        raise Untraceable("it has a part of the tokens, or other rows beside them")
    by_token = not flat and str(sizes(node)[1]) == str(
        input_node(graph, "input_ids").meta["val"].shape[1]
    )
    heads = None if flat else read_heads(norm.x, context, axes="thw" if by_token else "htw")
    if heads is not None and (
        heads.factor != 1 or heads.rotation is not None or heads.groups != heads.heads
    ):
        raise Untraceable("heads that are scaled, rotated or repeated")
    width = last_size(node)
    assert width is not None
    with graph.inserting_before(node):
        x = norm.x if heads is None else take_rows(build, heads.root, heads.rows)
        read = [
            None if p is None else read_slot(build, node, p, Rows(0, width, width), False)
            for p in (norm.gamma, norm.beta)
        ]
        count = 1 if heads is None else heads.heads
        args = (x, *read, norm.eps, norm.kind, count, norm.offset)
        new = build.call(
            norm_forward,
            *args,
            like=node,
            label=short_label(info(node).module),
            shape=("B", "T", count * width),
        )
        back = new if heads is None else _as_heads(graph, node, new, heads, by_token)
    node.replace_all_uses_with(back)


def _as_heads(
    graph: fx.Graph, node: fx.Node, flat: fx.Node, heads: Heads, by_token: bool
) -> fx.Node:
    """The (B, T, H * E) result as x was laid out: (B, T, H, E), or (B, H, T, E) where not
    by_token.
    """
    tokens = input_node(graph, "input_ids")
    lengths = []
    for axis in (0, 1):
        lengths.append(graph.call_function(aten.sym_size.int, (tokens, axis)))
        lengths[-1].meta["val"] = tokens.meta["val"].shape[axis]
    view = graph.call_function(aten.view.default, (flat, [*lengths, heads.heads, heads.width]))
    value = node.meta["val"]
    view.meta["val"] = value if by_token else value.transpose(1, 2)
    if by_token:
        return view
    turned = graph.call_function(aten.transpose.int, (view, 1, 2))
    turned.meta["val"] = value
    return turned
