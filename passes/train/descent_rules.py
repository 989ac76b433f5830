"""The descent rule of each operator that reads trained slots: what becomes of them.

y = linear_forward(x, W, b), gradient dy  ->  W' = linear_descent(W, dy, x, rate)
                                              b' = bias_descent(b, dy, rate)
y = norm_forward(x, gamma, beta), dy      ->  beta' = bias_descent(beta, dy, rate)
                                              gamma' = norm_descent(gamma, dy, x, ..., rate)
y = island_forward([x, W], ...), gradient g of W  ->  W' = island_descent(W, g, rate)
y = embedding(E, index, offset), dy       ->  E' = embedding_descent(E, dy, index, offset, rate)
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any, NamedTuple

from torch import fx

from tintc.ir.builder import operands
from tintc.ir.dialect import AnyOperator, argument, is_tint
from tintc.ir.ops.embedding import embedding, embedding_descent
from tintc.ir.ops.island import island_descent, island_forward
from tintc.ir.ops.linear import bias_descent, linear_descent, linear_forward, prefix
from tintc.ir.ops.norm import norm_descent, norm_forward
from tintc.ir.rules import RuleTable


class Update(NamedTuple):
    """A call operator(slot, *args, rate). slot: the weight that an operator reads, None where it
    has none.
    """

    operator: AnyOperator
    slot: fx.Node | None
    args: tuple[Any, ...]


DescentRule = Callable[[fx.Node, fx.Node], list[Update]]  # (node, dy)
descent_rule = RuleTable[DescentRule]("descent", needed_by=lambda o: bool(o.weights))


@descent_rule(linear_forward)
def _linear(node: fx.Node, dy: fx.Node) -> list[Update]:
    x, weight, bias = (argument(node, name) for name in ("x", "weight", "bias"))
    return [Update(linear_descent, weight, (dy, x)), Update(bias_descent, bias, (dy,))]


@descent_rule(norm_forward)
def _norm(node: fx.Node, dy: fx.Node) -> list[Update]:
    x, gamma, beta = (argument(node, name) for name in ("x", "gamma", "beta"))
    how = (argument(node, name) for name in ("eps", "kind", "heads"))
    return [Update(norm_descent, gamma, (dy, x, *how)), Update(bias_descent, beta, (dy,))]


@descent_rule(embedding)
def _embedding(node: fx.Node, dy: fx.Node) -> list[Update]:
    table, index, offset = (argument(node, name) for name in ("table", "index", "offset"))
    return [Update(embedding_descent, table, (dy, index, offset))]


@descent_rule(island_forward)
def _island(node: fx.Node, every: fx.Node) -> list[Update]:
    """every: the island_backward, whose items are the gradients."""
    inputs, wanted = argument(node, "inputs"), argument(every, "wanted")
    return [
        Update(island_descent, inputs[wanted[at]], (item,))
        for item in every.users
        if item.target is getitem and is_tint(inputs[wanted[at := operands(item)[1]]], prefix)
    ]
