"""Leaves updates as factors, so that no sequence needs a copy of a weight.

    linear_forward(x, linear_descent(W, dy_s, x_s, lr), b)
      ->  low_rank(linear_forward(x, W, b), x, x_s, dy_s, lr)
    linear_backward(dy, linear_descent(W, dy_s, x_s, lr))
      ->  low_rank(linear_backward(dy, W), dy, dy_s, x_s, lr)

The product with W is shared by all sequences, the rest is linear attention over the training tokens
(`ir/ops/low_rank.py`). After k steps a slot has k pairs of factors; they are concatenated. A bias
that descended with the same gradients is one more coordinate of the scores. Safe because it is the
same sum in another order. Only slots in `choices.low_rank`, which
`runtime/specialize/cost_model.py` picks.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import bias_descent, linear_backward, linear_descent, linear_forward
from tintc.ir.ops.low_rank import concatenate, low_rank
from tintc.ir.pass_manager import graph_pass


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def low_rank_updates(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    factors = _Factors(graph)
    for node in list(graph.nodes):
        weight = (
            argument(node, "weight") if is_tint(node, linear_forward, linear_backward) else node
        )
        if (
            weight is not node
            and is_tint(weight, linear_descent)
            and info(weight).slot in context.choices.low_rank
        ):
            _rewrite(node, factors)
    graph.eliminate_dead_code()
    return graph


def descents(value: fx.Node) -> list[fx.Node]:
    """The descents that lead from a slot's first value to this one, oldest first."""
    found: list[fx.Node] = []
    while is_tint(value, linear_descent, bias_descent):
        found.insert(0, value)
        value = argument(value, "weight" if is_tint(value, linear_descent) else "bias")
    return found


class _Factors:
    """Factors of several steps, each concatenation made once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.build = Builder(graph)
        self.made: dict[tuple[fx.Node, ...], fx.Node] = {}

    def together(self, parts: list[fx.Node], label: str) -> fx.Node:
        key = tuple(parts)
        if len(parts) > 1 and key not in self.made:
            fields = {"phase": info(parts[-1]).phase, "step": info(parts[-1]).step}
            self.made[key] = self.build.call(
                concatenate, parts, like=parts[-1], label=label, **fields
            )
        return self.made.get(key, parts[0])


def _rewrite(node: fx.Node, factors: _Factors) -> None:
    chain = descents(argument(node, "weight"))
    base, inner_lr = argument(chain[0], "weight"), argument(chain[0], "inner_lr")
    x, forward = node.args[0], is_tint(node, linear_forward)
    fields = {"phase": info(node).phase, "step": info(node).step}
    with node.graph.inserting_before(node):
        keys = factors.together([argument(d, "x") for d in chain], f"{base.name}_inputs")
        values = factors.together([argument(d, "dy") for d in chain], f"{base.name}_gradients")
        if forward:
            bias, with_bias = _bias(argument(node, "bias"), chain)
            y = factors.build.call(
                linear_forward, x, base, bias, like=node, label=f"{node.name}_shared", **fields
            )
            args = (y, x, keys, values, inner_lr, with_bias)
        else:
            y = factors.build.call(
                linear_backward, x, base, like=node, label=f"{node.name}_shared", **fields
            )
            args = (y, x, values, keys, inner_lr, False)
        new = factors.build.call(
            low_rank, *args, like=node, label=f"{node.name}_low_rank", **fields
        )
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _bias(bias: fx.Node | None, chain: list[fx.Node]) -> tuple[fx.Node | None, bool]:
    """(what the shared product adds, whether the bias's own descent is that of the weight's
    factors).
    """
    if bias is None or not is_tint(bias, bias_descent):
        return bias, False
    own = descents(bias)
    same = [argument(d, "dy") for d in own] == [argument(d, "dy") for d in chain]
    first: fx.Node = argument(own[0], "bias")
    return (first, True) if same and info(first).shape == info(bias).shape[1:] else (bias, False)
