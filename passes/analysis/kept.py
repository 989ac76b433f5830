"""Values at the kept positions, each made once."""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.dialect import AnyOperator, argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import kept_queries, kept_tokens, spread_tokens


class Kept:
    """positions: the input that names them."""

    def __init__(self, graph: fx.Graph, positions: fx.Node) -> None:
        self.build, self.positions = Builder(graph), positions
        self.made: dict[fx.Node, fx.Node] = {
            node.args[0]: node
            for node in graph.nodes
            if is_tint(node, kept_tokens, kept_queries) and node.args[1] is positions
        }

    def of(self, node: fx.Node) -> fx.Node:
        """A value of every token at the kept ones. What was spread from these is there already."""
        if is_tint(node, spread_tokens) and argument(node, "kept") is self.positions:
            dy: fx.Node = argument(node, "dy")
            return dy
        return self._made(kept_tokens, node)

    def queries(self, mask: fx.Node) -> fx.Node:
        """Their rows of an attention mask."""
        return self._made(kept_queries, mask)

    def _made(self, operator: AnyOperator, node: fx.Node) -> fx.Node:
        if node not in self.made:
            behind = node
            if node.op == "placeholder":
                behind = [n for n in self.build.graph.nodes if n.op == "placeholder"][-1]
            with self.build.graph.inserting_after(behind):
                place = {"phase": info(node).phase or "forward", "step": info(node).step or 0}
                self.made[node] = self.build.call(
                    operator, node, self.positions, like=node, label=f"{node.name}_kept", **place
                )
        return self.made[node]
