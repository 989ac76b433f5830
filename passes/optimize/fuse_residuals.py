"""Adds a residual while the product before it is written, instead of reading everything again.

    residual(linear_forward(x, W, b), z)
      ->  linear_residual(x, W, b, z)
    residual(linear_backward(dy, W), z)
      ->  the same with W transposed
    residual(low_rank(linear_forward(x, W, b), ...), z)
      ->  low_rank(linear_residual(x, W, b, z), ...)

Only where nothing else reads the product. Safe because sums commute, up to rounding.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint, operator_of
from tintc.ir.node_meta import info
from tintc.ir.ops.elementwise import residual
from tintc.ir.ops.linear import linear_backward, linear_forward, linear_residual
from tintc.ir.ops.low_rank import low_rank, low_rank_of_scores
from tintc.ir.pass_manager import graph_pass

_PRODUCTS = (linear_forward, linear_backward)


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def fuse_residuals(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    build = Builder(graph)
    for node in [n for n in graph.nodes if is_tint(n, residual)]:
        for product, addend in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if product is not addend and _fuse(build, node, product, addend):
                break
    return graph


def _fuse(build: Builder, node: fx.Node, product: fx.Node, addend: fx.Node) -> bool:
    correction = product if is_tint(product, low_rank, low_rank_of_scores) else None
    linear = product if correction is None else argument(correction, "y")
    if not is_tint(linear, *_PRODUCTS) or any(len(n.users) != 1 for n in (product, linear)):
        return False
    forward = is_tint(linear, linear_forward)
    fields = {"phase": info(node).phase, "step": info(node).step}
    args = (
        linear.args[0],
        argument(linear, "weight"),
        argument(linear, "bias") if forward else None,
        addend,
        not forward,
    )
    with build.graph.inserting_before(node):
        new = build.call(
            linear_residual, *args, like=linear, label=f"{linear.name}_residual", **fields
        )
        if correction is not None and (correcting := operator_of(correction)) is not None:
            new = build.call(
                correcting,
                new,
                *correction.args[1:],
                like=correction,
                label=f"{correction.name}_residual",
                **fields,
            )
    node.replace_all_uses_with(new)
    for dead in (node, correction, linear):
        if dead is not None:
            build.graph.erase_node(dead)
    return True
