"""Loss stands at the kept positions alone: head, loss and the way back run on these.

    z = linear_forward(h, E); dz = loss_gradient(z, y, m); dh = linear_backward(dz, E)
      ->  h' = kept_tokens(h); z = linear_forward(h', E); dz = loss_gradient(z, y', m')
          dh = spread_tokens(linear_backward(dz, E), h)
    linear_descent(E, dz, h)  ->  linear_descent(E, dz, h')
    token_losses(z, labels)   ->  token_losses(z, labels')

with y', m', labels' of the kept tokens. Safe because the caller's loss mask is 0 elsewhere, and
every position's logits are its own.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import further_input, reinfer
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.elementwise import scale
from tintc.ir.ops.embedding import spread_tokens
from tintc.ir.ops.head import token_losses
from tintc.ir.ops.linear import linear_backward, linear_forward
from tintc.ir.ops.loss import loss_gradient
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.kept import Kept

_TOKENS = ("B", "T")


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def loss_at_kept(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    kept = _Narrowed(graph)
    of_logits = [n for n in graph.nodes if is_tint(n, loss_gradient, token_losses)]
    for node in of_logits:
        head = _head(argument(node, "logits"))
        if head is not None:
            kept.narrow(head)
    for node in of_logits:  # what no such product stands before is computed for all tokens
        if is_tint(node, token_losses) and node not in kept.narrowed:
            node.args = (kept.of(argument(node, "logits")), kept.of(argument(node, "labels")))
    return reinfer(graph)


def _head(logits: fx.Node) -> fx.Node | None:
    """The product that these logits come from."""
    node = logits
    while is_tint(node, scale, activation_forward):
        node = argument(node, "x")
    return node if is_tint(node, linear_forward) else None


class _Narrowed(Kept):
    """Also what stands at the kept tokens alone."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph, further_input(graph, "kept"))
        self.narrowed: set[fx.Node] = set()

    def narrow(self, head: fx.Node) -> None:
        """The head, and all behind it that has a value for every token, up to the way back."""
        if head in self.narrowed:
            return
        whole: fx.Node = argument(head, "x")
        behind = {head}
        for node in list(self.build.graph.nodes):
            reads = any(
                n in behind and not is_tint(n, linear_backward) for n in node.all_input_nodes
            )
            if node is not head and (not reads or node.op == "output"):
                continue
            if info(node).shape[:2] == _TOKENS:
                behind.add(node)
            node.args = fx.node.map_arg(node.args, lambda n: n if n in behind else self._kept(n))
        for node in behind:
            if is_tint(node, linear_backward):
                self._spread(node, whole)
        self.narrowed |= behind

    def _kept(self, value: fx.Node) -> fx.Node:
        return self.of(value) if info(value).shape[:2] == _TOKENS else value

    def _spread(self, backward: fx.Node, like: fx.Node) -> None:
        with self.build.graph.inserting_after(backward):
            place = {"phase": info(backward).phase, "step": info(backward).step}
            whole = self.build.call(
                spread_tokens, backward, self.positions, like, like=backward,
                label=f"{backward.name}_spread", shape=info(like).shape, **place,
            )  # fmt: skip
        backward.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
