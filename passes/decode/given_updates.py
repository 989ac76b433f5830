"""Nothing is trained: the updated values of all slots are inputs.

    linear_forward(x, W', b'), ...  ->  linear_forward(x, W'_given, b'_given), ...
    of a slot in choices.factored:
    linear_forward(x, W', b')
      ->  low_rank_of_scores(linear_forward(x, W_0, b'_given), x . keys, values, rates)

The inputs are (B, ...), one value a context; with `choices.contexts` ONE they have no B, and
products know that all rows share them. Safe because it is the same sum (`ir/ops/low_rank.py`).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.builder import Builder, outputs, reinfer
from tintc.ir.choices import Contexts
from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, argument
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops.linear import linear_forward
from tintc.ir.ops.low_rank import low_rank, low_rank_of_scores
from tintc.ir.ops.rates import token_products
from tintc.ir.ops.wide import wide_linear
from tintc.ir.pass_manager import graph_pass
from tintc.ir.precision import HALF
from tintc.passes.analysis.factored import Factored, factored
from tintc.passes.analysis.update_forms import Pairs


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def given_updates(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    build, one = Builder(graph), context.choices.contexts is Contexts.ONE
    of_factors = factored(graph, context.choices.factored, Pairs(graph))
    updates = outputs(graph)["updates"]
    for slot, node in updates.items():
        if slot not in of_factors:
            shape = info(node).shape[1:] if one else info(node).shape
            given = build.placeholder(f"{node.name}_given", shape)
            copy_info(node, given, role="input", shape=shape, wide=True)
            node.replace_all_uses_with(given)
    factors = _Factors(graph, shared=context.choices.dtype not in HALF)
    for found in of_factors.values():
        for product in list(found.node.users):
            if product.op != "output":
                factors.rewrite(product, found)
    return reinfer(graph)


class _Factors:
    """Inputs and scores, each made once. shared: products of one activation share their scores;
    these are in float32 at least, which half-precision factors would be widened for: there the
    shared product is wide instead (`low_rank_updates`).
    """

    def __init__(self, graph: fx.Graph, *, shared: bool) -> None:
        self.build, self.shared = Builder(graph), shared
        self.given: dict[str, fx.Node] = {}
        self.scores: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def rewrite(self, product: fx.Node, found: Factored) -> None:
        x = argument(product, "x")
        keys = self._input(found.names.keys, found.node, info(found.node).shape[-1])
        values = self._input(found.names.values, found.node, info(found.node).shape[-2])
        rates = self._input(found.names.rates, found.node)
        fields: dict[str, Any] = {"phase": info(product).phase, "step": info(product).step}
        with self.build.graph.inserting_before(product):
            product_of = (x, found.base, argument(product, "bias"))
            called: tuple[Any, ...] = (
                (linear_forward, *product_of) if self.shared else (wide_linear, *product_of, False)
            )
            y = self.build.call(*called, like=product, label=f"{product.name}_shared", **fields)
            operator: AnyOperator = low_rank_of_scores if self.shared else low_rank
            of = (self._scores(x, keys, fields),) if self.shared else (x, keys)
            new = self.build.call(
                operator, y, *of, values, rates, False, like=product,
                label=f"{product.name}_low_rank", **fields,
            )  # fmt: skip
        product.replace_all_uses_with(new)
        self.build.graph.erase_node(product)

    def _scores(self, x: fx.Node, keys: fx.Node, fields: dict[str, Any]) -> fx.Node:
        if (x, keys) not in self.scores:
            self.scores[x, keys] = self.build.call(token_products, x, keys, like=x, **fields)
        return self.scores[x, keys]

    def _input(self, name: str, like: fx.Node, *width: Any) -> fx.Node:
        if name not in self.given:
            label = name.replace(".", "_").replace("/", "_")
            shape = ("B", "F", *width)
            given = self.build.placeholder(label, shape)
            copy_info(like, given, role="input", slot=name, shape=shape, wide=not width)
            self.given[name] = given
        return self.given[name]
