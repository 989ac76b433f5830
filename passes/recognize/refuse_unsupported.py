"""Refuses a graph that still holds anything but `tint` operators, and names every one at once.

Changes nothing in a graph that it accepts.
"""

from __future__ import annotations

import operator
from collections import defaultdict

from torch import fx

from tintc.ir.context import Context
from tintc.ir.dialect import is_recognized, tint_name
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.patterns import LAYOUT, aten, calls

_SUPPORTED = (
    "supported: embeddings of tokens and positions, linear layers, layer and RMS norms, relu, "
    "gelu, silu, tanh, sigmoid, squared relu, "
    "learned and constant scales, causal attention with rotary positions, ALiBi, windows or "
    "soft-caps, sums and products of two activations"
)


@graph_pass(requires=("well_formed",), ensures=("tint_only", "one_logits_output"))
def refuse_unsupported(graph: fx.Graph, context: Context) -> fx.Graph:
    """Raises UnsupportedModelError listing operator, count, module path, source line and reason of
    all that was not recognised.
    """
    left = [n for n in graph.nodes if n.op == "call_function" and not is_recognized(n)]
    if not left:
        return graph
    groups: dict[tuple[str, str, str], list[fx.Node]] = defaultdict(list)
    for node in _findings(left):
        name = "getitem" if node.target is operator.getitem else str(node.target)
        reason = info(node).barred or info(node).refused
        groups[name, info(node).source, reason].append(node)
    lines = [
        f"{name} x{len(nodes)} in {info(nodes[0]).module or 'the model'} "
        f"({source or 'no source line'})" + (f": {reason}" if reason else "")
        for (name, source, reason), nodes in groups.items()
    ]
    raise UnsupportedModelError(
        "cannot simulate this model: " + "; ".join(lines) + ". " + _SUPPORTED
    )


def _findings(left: list[fx.Node]) -> list[fx.Node]:
    """The operators to name: those that compute with activations or weights. Masks and positions
    that an unrecognised attention still reads, views around it, and sums with something
    unrecognised are consequences."""
    barred = [node for node in left if info(node).barred]
    if barred:
        return barred
    computing: set[fx.Node] = set()
    for node in left:  # in topological order
        inputs = node.all_input_nodes
        if info(node).refused or any(
            tint_name(n) or info(n).role == "parameter" or n in computing for n in inputs
        ):
            computing.add(node)
    causes = [
        n
        for n in left
        if n in computing and not calls(n, *LAYOUT) and not _is_consequence(n, computing)
    ]
    return (
        causes
        or [n for n in left if info(n).refused]
        or [n for n in left if n in computing]
        or left
    )


def _is_consequence(node: fx.Node, computing: set[fx.Node]) -> bool:
    """A sum of two activations, one of which is itself unrecognised."""
    unrecognised = [source for source in node.all_input_nodes if source in computing]
    activations = [
        source for source in node.all_input_nodes if source in computing or tint_name(source)
    ]
    return calls(node, aten.add) and len(activations) == 2 and bool(unrecognised)
