"""Removes what no output needs: operators without users, and parameters and constants that
nothing reads.

y = op(x)   (y unused)  ->  nothing
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import remove_dead
from tintc.ir.context import Context
from tintc.ir.inputs import INPUTS
from tintc.ir.pass_manager import graph_pass


@graph_pass(requires=("well_formed",), ensures=("no_dead_code",))
def dead_code(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. The simulator's own inputs stay, used or not."""
    remove_dead(graph)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and node.name not in INPUTS:
            graph.erase_node(node)
    return graph
