"""Takes the slope of a ReLU from what came out of it, so that what went in need not be held.

    y = activation_forward(x, "relu"), activation_backward(dy, x, "relu", "exact")
      ->  activation_backward(dy, y, "relu", "exact")

The next layer's descent holds y anyway. Safe because y > 0 just where x > 0; the derivatives of
other spellings at exactly 0 tell 0 from what is below it.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.activation import activation_backward, activation_forward
from tintc.ir.pass_manager import graph_pass


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def relu_from_output(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    for node in graph.nodes:
        if not is_tint(node, activation_backward) or argument(node, "gradient") != "exact":
            continue
        x = argument(node, "x")
        came_out = [user for user in x.users if is_tint(user, activation_forward)]
        if came_out and argument(node, "kind") == argument(came_out[0], "kind") == "relu":
            node.update_arg(1, came_out[0])
    return graph
