"""Elementwise activations and constant multiples, however they are spelled.

    an elementwise expression of one activation x that is c x
      ->  tint.scale(x, c)
    ... or one of relu, clamp, maximum, gelu (exact, tanh, quick), silu, tanh, sigmoid
      ->  tint.activation_forward(x, kind)

Expressions are evaluated on a grid of numbers, not matched, and compared with the known functions.
At a kink the derivative decides: relu, clamp(min=0) and maximum(x, 0) differ at 0 alone.
The outermost expression that is one of them wins: a written-out GELU contains a tanh of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tintc.ir.builder import Builder, short_label
from tintc.ir.context import Context
from tintc.ir.dialect import tint_name
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import KINDS, RELUS, activation_forward
from tintc.ir.ops.elementwise import scale
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.evaluation import constant, is_positional, is_weight
from tintc.passes.analysis.patterns import aten, calls, is_of_tokens, sizes

_ELEMENTWISE = (
    *(
        aten.add,
        aten.sub,
        aten.rsub,
        aten.mul,
        aten.div,
        aten.pow,
        aten.square,
        aten.neg,
        aten.exp,
        aten.reciprocal,
        aten.abs,
        aten.sqrt,
    ),
    *(
        aten.tanh,
        aten.sigmoid,
        aten.erf,
        aten.relu,
        aten.relu_,
        aten.gelu,
        aten.silu,
        aten.silu_,
        aten.clamp,
        aten.clamp_min,
    ),
    *(
        aten.maximum,
        aten.minimum,
        aten.softplus,
        aten.log,
        aten.log1p,
        aten.cosh,
        aten.leaky_relu,
        aten.hardtanh,
    ),
)
_OF_TENSORS = (aten.maximum, aten.minimum)
_NO_BOUND = 1e30  # clamps to the largest number of a type bound nothing
_TOLERANCE = 1e-6  # models write the constants of a GELU with 7 to 10 digits


@graph_pass(
    requires=("well_formed",), ensures=("well_formed",), reads=("max_positions", "max_tokens")
)
def recognize_activation(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Repeated, since c tanh(x / c) is an activation only once x / c
    is a multiple.
    """
    changed = True
    while changed:
        changed = False
        for node in reversed(list(graph.nodes)):
            if node.users and calls(node, *_ELEMENTWISE) and _is_activation(node):
                changed |= _replace(graph, node, context)
        graph.eliminate_dead_code()
    return graph


def _is_activation(node: fx.Node) -> bool:
    """Whether the value is (B, T, D) and depends on the tokens."""
    return is_of_tokens(node) and not is_positional(node)


def _replace(graph: fx.Graph, node: fx.Node, context: Context) -> bool:
    found = _match(node, context)
    if found is None:
        return False
    x, kind = found
    if kind == 1.0:
        node.replace_all_uses_with(x)
        return True
    operator, suffix = (scale, "scaled") if isinstance(kind, float) else (activation_forward, kind)
    with graph.inserting_before(node):
        label = f"{short_label(info(node).module)}_{suffix}"
        new = Builder(graph).call(
            operator, x, kind, like=node, label=label, shape=("B", "T", sizes(node)[-1])
        )
    node.replace_all_uses_with(new)
    return True


def _match(node: fx.Node, context: Context) -> tuple[fx.Node, float | str] | None:
    """(x, what the node is of it): the smallest expression that is an activation, or else the
    smallest that is a multiple.
    """
    inside, multiple = [node], None
    while True:
        leaves = {n for n in _inputs(inside, context) if n not in inside}
        if not leaves or any(is_weight(leaf) or not _is_activation(leaf) for leaf in leaves):
            return multiple
        last = max(leaves)
        kind = _kind(inside, last, context) if len(leaves) == 1 else None
        if isinstance(kind, str):
            return last, kind
        multiple = (last, kind) if multiple is None and kind is not None else multiple
        if tint_name(last) or not calls(last, *_ELEMENTWISE):
            return multiple
        inside.append(last)


def _inputs(nodes: list[fx.Node], context: Context) -> list[fx.Node]:
    return [
        source
        for node in nodes
        for source in node.all_input_nodes
        if constant(source, context) is None
    ]


def _kind(inside: list[fx.Node], x: fx.Node, context: Context) -> float | str | None:
    """A factor, the name of an activation, or None."""
    grid = _grid(inside, context)
    result = _value(inside, x, grid, context)
    if result is None or result.shape != grid.shape:
        return None
    factor = float(result[-1] / grid[-1])
    if torch.allclose(
        result.double(), grid * factor, rtol=1e-12, atol=0
    ):  # strictly: x + eps is no multiple of x
        return factor
    kind = next((kind for kind in KINDS if _close(result, activation_forward(grid, kind))), None)
    return _relu(inside, x, context) if kind in RELUS else kind


def _value(inside: list[fx.Node], x: fx.Node, at: Tensor, context: Context) -> Tensor | None:
    """The expression's value where x has the given one; None where it cannot be computed."""
    values: dict[fx.Node, Any] = {x: at}

    def value(source: fx.Node) -> Any:
        if source in values:
            return values[source]
        plain = constant(source, context)
        # Some operators take tensors alone, others a number in place of one.
        return torch.tensor(plain, dtype=at.dtype) if calls(node, *_OF_TENSORS) else plain

    try:
        for node in reversed(inside):
            values[node] = node.target(  # type: ignore[operator]
                *fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value)
            )
    except (RuntimeError, TypeError, KeyError):
        return None
    result: Tensor = values[inside[0]]
    return result


def _relu(inside: list[fx.Node], x: fx.Node, context: Context) -> str | None:
    """Which spelling of max(x, 0) has the derivative at 0 that the expression has."""
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        result = _value(inside, x, zero, context)
        if result is None or not result.requires_grad:
            return None
        (slope,) = torch.autograd.grad(result.sum(), zero)
    return next((kind for kind, at_zero in RELUS.items() if at_zero == float(slope)), None)


def _grid(inside: list[fx.Node], context: Context) -> Tensor:
    """Where to compare: the usual range of activations, and around whatever number the expression
    compares or scales with.
    """
    constants = [
        c
        for n in inside
        for a in (*n.args, *n.kwargs.values())
        if (c := constant(a, context)) is not None
    ]
    bounds = torch.tensor([c for c in constants if c and abs(c) < _NO_BOUND], dtype=torch.float64)
    around = torch.cat(
        [bounds, torch.outer(bounds, bounds).flatten(), torch.outer(bounds, 1 / bounds).flatten()]
    )
    behind = torch.outer(
        around, torch.tensor([-2.0, -1.1, -0.9, 0.9, 1.1, 2.0], dtype=torch.float64)
    ).flatten()
    return torch.cat(
        [torch.linspace(-0.5, 0.5, 22).double(), behind, torch.linspace(-9, 9, 145).double()]
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool(
        ((found.double() - expected).abs() <= _TOLERANCE * expected.abs().clamp(min=1)).all()
    )
