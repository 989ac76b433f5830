"""How much memory a decoded token reads."""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import descendants
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding
from tintc.ir.ops.linear import prefix
from tintc.runtime.adapted import Adapted
from tintc.runtime.specialize.cached_layers import decode_graph


def bytes_read(adapted: Adapted) -> int:
    """Bytes of weights and factors that a token of every sequence reads: all of a matrix, but the
    rows alone of a table that is only looked up in. Cached keys and values are not counted.
    """
    graph = decode_graph(adapted.simulator.program, adapted.updates.factored)
    weights = adapted.simulator.prefix.direct()
    learned = adapted.updates.values
    total = 0
    for node in graph.find_nodes(op="placeholder"):
        if not _is_read_whole(node):
            continue
        for value in (weights.get(info(node).parameter or ""), learned.get(info(node).slot or "")):
            total += 0 if value is None else value.nbytes
    return total


def _is_read_whole(placeholder: fx.Node) -> bool:
    readers = [
        user
        for node in (placeholder, *descendants([placeholder]))
        if node is placeholder or is_tint(node, prefix)
        for user in node.users
        if not is_tint(user, prefix)
    ]
    return any(not is_tint(user, embedding) for user in readers)
