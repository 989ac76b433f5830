"""The head, the loss and their way back at some positions alone, where the loss is 0 elsewhere.

    z = linear_forward(h, E); dz = loss_gradient(z, y, m); dh = linear_backward(dz, E)
      ->  h' = kept_tokens(h); z = linear_forward(h', E); dz = loss_gradient(z, y', m')
          dh = spread_tokens(linear_backward(dz, E), m)
    linear_descent(E, dz, h)  ->  linear_descent(E, dz, h')

with y', m' of the kept tokens.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.elementwise import scale
from tintc.ir.ops.embedding import spread_tokens
from tintc.ir.ops.linear import linear_backward, linear_forward
from tintc.ir.ops.loss import loss_gradient
from tintc.passes.analysis.kept import Kept


def head_of(logits: fx.Node) -> fx.Node | None:
    """The product that these logits come from."""
    node = logits
    while is_tint(node, scale, activation_forward):
        node = argument(node, "x")
    return node if is_tint(node, linear_forward) else None


def behind_head(logits: fx.Node) -> list[fx.Node]:
    """What scales and caps that product on its way to the logits, in order."""
    found: list[fx.Node] = []
    while is_tint(logits, scale, activation_forward):
        found.insert(0, logits)
        logits = argument(logits, "x")
    return found


class NarrowedHead(Kept):
    """Also what stands at the kept tokens alone. tokens: what a shape calls all of them."""

    def __init__(self, graph: fx.Graph, positions: fx.Node, tokens: str) -> None:
        super().__init__(graph, positions)
        self.all = ("B", tokens)
        self.narrowed: set[fx.Node] = set()

    def narrow(self, head: fx.Node) -> None:
        """The head, and all behind it that has a value for every token, up to the way back."""
        if head in self.narrowed:
            return
        behind = {head}
        masks: list[fx.Node] = []
        for node in list(self.build.graph.nodes):
            reads = any(
                n in behind and not is_tint(n, linear_backward) for n in node.all_input_nodes
            )
            if node is not head and (not reads or node.op == "output"):
                continue
            if info(node).shape[:2] == self.all:
                behind.add(node)
            if is_tint(node, loss_gradient):
                masks.append(argument(node, "mask"))
            node.args = fx.node.map_arg(node.args, lambda n: n if n in behind else self._kept(n))
        for node in behind:
            if is_tint(node, linear_backward):
                self._spread(node, masks[0])
        self.narrowed |= behind

    def _kept(self, value: fx.Node) -> fx.Node:
        return self.of(value) if info(value).shape[:2] == self.all else value

    def _spread(self, backward: fx.Node, like: fx.Node) -> None:
        """like: a number of every token that keeps nothing from being narrowed."""
        with self.build.graph.inserting_after(backward):
            place = {"phase": info(backward).phase, "step": info(backward).step}
            whole = self.build.call(
                spread_tokens, backward, self.positions, like, like=backward,
                label=f"{backward.name}_spread", shape=info(backward).shape, **place,
            )  # fmt: skip
        backward.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
