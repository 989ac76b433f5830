"""Refuses a graph that still holds anything but `tint` operators, and names every one at once.

Changes nothing in a graph that it accepts.
"""

from __future__ import annotations

import operator
from collections import defaultdict

from torch import fx

from tintc.compiler.dialect import tint_name
from tintc.compiler.errors import UnsupportedModelError
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass
from tintc.passes.patterns import depends_on

_SUPPORTED = (
    "supported: embeddings of tokens and positions, linear, layer_norm, relu, gelu, silu, tanh, "
    "causal scaled_dot_product_attention, sums of two activations"
)


@graph_pass(requires=("well_formed",), ensures=("tint_only", "one_logits_output"))
def refuse_unsupported(graph: fx.Graph, context: Context) -> fx.Graph:
    """Raises UnsupportedModelError listing operator, count, module path, source line and reason of all that was not recognised."""
    left = [n for n in graph.nodes if n.op == "call_function" and tint_name(n) is None]
    # Shape arithmetic in front of an unrecognised operator is its consequence, not a finding of its own.
    findings = [n for n in left if info(n).refused] or [n for n in left if depends_on(n, lambda m: tint_name(m) is not None)] or left
    if not left:
        return graph
    groups: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)
    for node in findings:
        name = node.target.__name__ if node.target is operator.getitem else str(node.target)
        groups[name, info(node).refused].append(node)
    lines = [
        f"{name} x{len(nodes)} in {info(nodes[0]).module or 'the model'} ({info(nodes[0]).source or 'no source line'})"
        + (f": {reason}" if reason else "")
        for (name, reason), nodes in groups.items()
    ]
    raise UnsupportedModelError("cannot simulate this model: " + "; ".join(lines) + ". " + _SUPPORTED)
