"""Leaves the descents of embeddings as what each training token adds, so that no sequence needs a
copy of a table.

    embedding(embedding_descent(E, dy, keys, ...), index)
      ->  same_rows(embedding(E, index), index, keys, dy, ...)
    linear_forward(x, embedding_descent(E, ...), b)
      ->  scattered_scores(linear_forward(x, E, b), x, keys, dy, ...)
    linear_backward(dz, embedding_descent(E, ...))
      ->  gathered_scores(linear_backward(dz, E), dz, keys, dy, ...)
    embedding(linear_descent(E, dz, h, ...), index)
      ->  rows_of_factors(embedding(E, index), index, dz, h, ...)

The last three are of a table that is the head's weight too; there all descents are left, or none:
those of the head must be in `choices.low_rank`. Runs behind low_rank_updates, which takes the
head's newest descents. Safe because it is the same sum in another order. Not where the updated
values themselves are wanted.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.builder import Builder, remove_dead
from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, argument, is_tint, operator_of
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding, embedding_descent
from tintc.ir.ops.linear import linear_backward, linear_descent, linear_forward
from tintc.ir.ops.low_rank import low_rank
from tintc.ir.ops.sparse import gathered_scores, rows_of_factors, same_rows, scattered_scores
from tintc.ir.outputs import Output
from tintc.ir.pass_manager import graph_pass

_READERS: dict[AnyOperator | None, str] = {
    embedding: "table",
    linear_forward: "weight",
    linear_backward: "weight",
}


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def sparse_tables(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    if Output.UPDATES in context.choices.outputs:
        return graph
    build = Builder(graph)
    for node in list(graph.nodes):
        name = _READERS.get(operator_of(node))
        if name is not None:
            table = argument(node, name)
            chain = _descents(table)
            if _stays(node, chain, context):
                _rewrite(build, node, table, chain)
    remove_dead(graph)
    return graph


def _descents(value: fx.Node) -> list[fx.Node]:
    """The descents that lead from a table's first value to this one, oldest first."""
    found: list[fx.Node] = []
    while is_tint(value, embedding_descent, linear_descent):
        found.insert(0, value)
        value = value.args[0]  # type: ignore[assignment]
    return found


def _stays(node: fx.Node, chain: list[fx.Node], context: Context) -> bool:
    """Whether a read takes the descents one by one."""
    of_rows = any(is_tint(descent, embedding_descent) for descent in chain)
    of_head = [descent for descent in chain if is_tint(descent, linear_descent)]
    if not of_rows and not (of_head and is_tint(node, embedding)):
        return False
    return all(info(descent).slot in context.choices.low_rank for descent in of_head)


def _rewrite(build: Builder, node: fx.Node, table: fx.Node, chain: list[fx.Node]) -> None:
    fields: dict[str, Any] = {"phase": info(node).phase, "step": info(node).step}
    called = operator_of(node)
    assert called is not None
    with build.graph.inserting_before(node):
        args = [chain[0].args[0] if value is table else value for value in node.args]
        value = build.call(called, *args, like=node, label=f"{node.name}_shared", **fields)
        for descent in chain:
            operator, further = _addition(node, descent)
            value = build.call(
                operator, value, *further, like=node, label=f"{node.name}_sparse", **fields
            )
    node.replace_all_uses_with(value)
    build.graph.erase_node(node)


def _addition(node: fx.Node, descent: fx.Node) -> tuple[AnyOperator, tuple[Any, ...]]:
    """What one descent adds to a read: the operator, and its arguments behind the value."""
    index, offset = node.args[1:3] if is_tint(node, embedding) else (None, None)
    if is_tint(descent, linear_descent):
        _, dz, h, rate = descent.args
        if is_tint(node, embedding):
            return rows_of_factors, (index, offset, dz, h, rate)
        forward = is_tint(node, linear_forward)
        keys, values = (h, dz) if forward else (dz, h)
        return low_rank, (node.args[0], keys, values, rate, False)
    _, dy, keys, key_offset, rate = descent.args
    if is_tint(node, embedding):
        return same_rows, (index, offset, keys, key_offset, dy, rate)
    operator = scattered_scores if is_tint(node, linear_forward) else gathered_scores
    return operator, (node.args[0], keys, key_offset, dy, rate)
