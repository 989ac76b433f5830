"""Takes the step of a weight as soon as its gradient is known, so that what the step reads need not
be held until all gradients are.

    dy_2 = backward(...); dy_1 = backward(dy_2); W_2' = descent(W_2, dy_2, x_2); W_1' = ...
      ->  dy_2 = backward(...); W_2' = descent(W_2, dy_2, x_2); dy_1 = backward(dy_2); W_1' = ...

A descent stays behind all that read the value before it, which it may then write over
(`runtime/specialize/written_over.py`). Safe because only the order changes.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.context import Context
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass

Place = tuple[int, int]  # of the node that stays, and among those that were moved behind it


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def early_descents(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    nodes = list(graph.nodes)
    places: dict[fx.Node, Place] = {node: (number, 0) for number, node in enumerate(nodes)}
    lasts = dict(enumerate(nodes))  # of those that stand behind one that stays
    for count, node in enumerate(nodes, start=1):
        if node.op != "call_function" or info(node).phase != "descent":
            continue
        first, _ = max(places[each] for each in _before(node, places))
        if nodes[first].op == "call_function":
            lasts[first].append(node)
            lasts[first], places[node] = node, (first, count)
    return graph


def _before(node: fx.Node, places: dict[fx.Node, Place]) -> list[fx.Node]:
    """What a descent reads, and the other readers of the value that it changes."""
    changed = node.args[0]
    readers = list(changed.users) if isinstance(changed, fx.Node) else []
    earlier = [user for user in readers if places[user] < places[node]]
    return [*node.all_input_nodes, *earlier]
