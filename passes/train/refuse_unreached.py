"""Refuses a program that trains nothing: no gradient reaches any of the weights that are to learn.

Changes nothing in a graph that updates a slot. Under value-only attention, for one, no gradient
reaches the weights of queries and keys; beside others they are left as they are, and reports list
them.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import outputs
from tintc.ir.context import Context
from tintc.ir.dialect import argument
from tintc.ir.errors import UnsupportedModelError, UsageError
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass
from tintc.ir.selection import shortened


@graph_pass(requires=("named_outputs",), ensures=("named_outputs",))
def refuse_unreached(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Raises UsageError where patterns chose the weights, else
    UnsupportedModelError.
    """
    if outputs(graph)["updates"]:
        return graph
    chosen = dict.fromkeys(
        info(argument(node, "parameter")).parameter or ""
        for node in graph.nodes
        if info(node).trainable
    )
    config = context.config
    problem = (
        f"no gradient reaches what is to be trained, {shortened(chosen)}, with attention_gradient "
        f"{config.attention_gradient}"
    )
    if config.train or config.lr_scale:
        raise UsageError(f"{problem}; expected patterns of a weight that one reaches")
    raise UnsupportedModelError(f"{problem}; expected a weight that one reaches")
