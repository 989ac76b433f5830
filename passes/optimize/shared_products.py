"""Makes a product once that several passes need: of a value and a weight that no update reached.

    linear_forward(x, W, b), ... linear_forward(x, W, b)
      ->  y = linear_forward(x, W, b), read twice
    linear_forward(segment(x, n), W, b), ... linear_forward(x, W, b)
      ->  y = linear_forward(x, W, b), of which the first is segment(y, n)

Where updates stay factors, the shared product of the lowest trained layer is the same in every
training pass, and its first tokens are those of the last forward pass. Safe because a product goes
token by token.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, remove_dead
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint, with_arguments
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import segment
from tintc.ir.ops.linear import linear_forward
from tintc.ir.pass_manager import graph_pass

_Product = tuple[object, ...]  # the arguments of one


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def shared_products(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    made: dict[_Product, fx.Node] = {}
    for node in [n for n in graph.nodes if is_tint(n, linear_forward)]:
        first = made.setdefault(node.args, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    for node in [n for n in made.values() if is_tint(argument(n, "x"), segment)]:
        part = argument(node, "x")
        whole = made.get(with_arguments(node, {"x": argument(part, "x")}))
        if whole is not None:
            _cut(Builder(graph), node, part, whole)
    remove_dead(graph)
    return graph


def _cut(build: Builder, node: fx.Node, part: fx.Node, whole: fx.Node) -> None:
    """The first tokens of a product, which moves in front of them if it stands behind."""
    record = info(node)
    if node < whole:
        node.prepend(whole)
    with build.graph.inserting_before(node):
        first = build.call(
            segment, whole, argument(part, "length"), like=node, label=f"{node.name}_shared",
            phase=record.phase, step=record.step,
        )  # fmt: skip
    node.replace_all_uses_with(first)
    build.graph.erase_node(node)
