"""The order of a graph's nodes, after a pass that put some in front of their operands."""

from __future__ import annotations

from torch import fx


def in_order(graph: fx.Graph) -> None:
    """Moves every node behind what it reads; else the order stays. The graph has no circle."""
    placed: set[fx.Node] = set()
    last: fx.Node | None = None
    for root in list(graph.nodes):
        stack = [root]
        while stack:
            node = stack[-1]
            missing = [n for n in node.all_input_nodes if n not in placed]
            if missing:
                stack += missing
                continue
            stack.pop()
            if node in placed:
                continue
            placed.add(node)
            if last is not None:
                last.append(node)
            last = node
