"""How much the values of a program hold at once, for any sizes, from shapes alone.

A value lives from the node that makes it to its last reader; a view lives as long as what it is
one of. What kernels allocate inside, weights and inputs come on top.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from tintc.ir.dialect import argument, is_tint, is_wide, operator_of
from tintc.ir.node_meta import Shape, info, shapes_of, size_of
from tintc.ir.ops.head import head_logits


@dataclass(frozen=True)
class Lifetime:
    """made, last: numbers of the nodes that make it, and that read it last. width: bytes of a
    number; 0 for those of the type that is computed in, or, where they are wide, of a wider one.
    """

    shape: Shape
    made: int
    last: int
    width: int = 0
    wide: bool = False


def lifetimes(graph: fx.Graph, over: Collection[fx.Node] = ()) -> tuple[Lifetime, ...]:
    """Of all values that the graph makes. over: descents that write over the weight that they
    get.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    own: dict[fx.Node, fx.Node] = {}  # a view -> what it is one of
    last: dict[fx.Node, int] = {}
    for node, place in places.items():
        own[node] = own[node.all_input_nodes[0]] if node in over else _owner(node, own)
        for source in node.all_input_nodes:
            last[own[source]] = place
    made = [node for node in places if own[node] is node and node.op == "call_function"]
    return tuple(
        Lifetime(
            shape,
            places[node],
            last.get(node, places[node]),
            _WIDTH.get(info(node).dtype, 0),
            is_wide(node),
        )
        for node in made
        for shape in shapes_of(node)
    )


_WIDTH = {"int": 8, "bool": 1}
_FLOAT32 = 4  # bytes, of what is wide


def bytes_held(values: tuple[Lifetime, ...], sizes: Mapping[str, int], width: int) -> int:
    """The most that they hold at once. sizes: B, T and S. width: bytes of a number."""
    changes: dict[int, int] = {}
    for value in values:
        size = value.width or (max(width, _FLOAT32) if value.wide else width)
        for dimension in value.shape:
            size *= size_of(dimension, sizes)
        changes[value.made] = changes.get(value.made, 0) + size
        changes[value.last + 1] = changes.get(value.last + 1, 0) - size
    held = most = 0
    for place in sorted(changes):
        held += changes[place]
        most = max(most, held)
    return most


def _owner(node: fx.Node, own: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node whose memory this one's value lies in."""
    source: object = None
    if node.target is operator.getitem or (
        (called := operator_of(node)) is not None and "Tensor(a)" in called.schema
    ):
        source = node.args[0]
    elif is_tint(node, head_logits):
        source = argument(node, "into")
    return own[source] if isinstance(source, fx.Node) else node
