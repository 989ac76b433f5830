"""Proves that a lowered graph is sound; changes nothing.

Well formed, only `tint` operators with operands of their types, recorded shapes follow from the
rules, nothing reads a later step, no dead code, every slot has a place and is read as it lies
there, and no two ranges that are live together overlap. Raises CompilerBug otherwise.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.context import Context
from tintc.ir.pass_manager import graph_pass

LOWERED = (
    *(
        "well_formed",
        "tint_only",
        "operands_fit",
        "named_outputs",
        "shapes_agree",
        "phases_in_order",
        "no_gradients_left",
    ),
    *("no_dead_code", "slots_fit", "prefix_slots_disjoint", "memory_slots_disjoint"),
)


@graph_pass(requires=LOWERED)
def verify(graph: fx.Graph, context: Context) -> fx.Graph:
    """The pass manager has checked everything by the time this runs."""
    return graph
