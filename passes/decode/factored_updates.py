"""Updates leave the program as factors: nothing of a weight's size is made.

    outputs: updates = {slot: W'}
      ->  {slot/keys: x of all steps, slot/values: dy, slot/rates: rate of each token}

of the slots in `choices.factored`; the others are returned as they are. Safe because
`given_updates` reads them by the same names (`passes/analysis/factored.py`).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.builder import outputs
from tintc.ir.context import Context
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.factored import factored
from tintc.passes.analysis.update_forms import Pairs


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def factored_updates(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    pairs = Pairs(graph)
    output = graph.output_node()
    returned: dict[str, Any] = dict(outputs(graph))
    updates = dict(returned["updates"])
    for slot, found in factored(graph, context.choices.factored, pairs).items():
        with graph.inserting_before(output):
            keys, values = pairs.pair(found.terms, slot.replace(".", "_"))
            rates = pairs.rates(found.terms, output.prev)
        del updates[slot]
        updates |= zip(found.names, (keys, values, rates), strict=True)
    output.args = ({**returned, "updates": updates},)
    return graph
