"""Token and position embeddings.

    embedding(table, input_ids)
      ->  tint.embedding(table, input_ids, 0)
    embedding(table, arithmetic of the sizes = 0 1 2 ... + c)
      ->  tint.embedding(table, position_ids, c)
    x + table[c : c + T]
      ->  x + tint.embedding(table, position_ids, c)
    x + arithmetic of the sizes (T, D)
      ->  x + tint.embedding(table of its values, position_ids, 0)

The arithmetic is evaluated, not matched: whatever gives consecutive positions is a position. The
simulator owns positions (padding, restarts), so the graph gets a `position_ids` input in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tintc.ir.builder import Builder, ancestors, operands, short_label
from tintc.ir.context import Context
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.evaluation import (
    SHORT,
    Evaluation,
    evaluated_length,
    is_positional,
    is_weight,
    lengths_below,
)
from tintc.passes.analysis.patterns import (
    VIEWS,
    aten,
    binary,
    calls,
    is_parameter,
    sizes,
    with_defaults,
)
from tintc.passes.analysis.tables import read_table

_WIDENING = (*VIEWS, aten.unsqueeze, aten.expand, aten.repeat, aten.broadcast_to, aten.expand_as)
_UNEVALUABLE = (RuntimeError, TypeError, KeyError, IndexError)


@graph_pass(
    requires=("well_formed",),
    ensures=("well_formed",),
    reads=("max_tokens",),
    writes=("hidden", "vocab_size", "max_positions", "tables"),
)
def recognize_embedding(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    build = Builder(graph)
    tokens = next(n for n in graph.nodes if info(n).role == "input")
    for node in [n for n in graph.nodes if calls(n, aten.embedding)]:
        table, index = operands(node)[:2]
        if not is_parameter(table):
            info(
                node
            ).refused = (
                "its table is not in the state dict; expected a parameter or a persistent buffer"
            )
            continue
        if index is tokens:
            rows, width = context.tensors[info(table).parameter or ""].shape
            facts = context.facts
            context.learn(
                vocab_size=min(rows, facts.vocab_size or rows), hidden=max(width, facts.hidden)
            )
            index_node, offset = tokens, 0
        else:
            rows = context.tensors[info(table).parameter or ""].shape[0]
            found = _position_offset(index, rows, context)
            if isinstance(found, str):
                info(node).refused = found
                continue
            index_node, offset = build.input("position_ids"), found
            context.limit_positions(rows - offset)
        with graph.inserting_before(node):
            new = build.call(
                embedding,
                table,
                index_node,
                offset,
                *_padding(node),
                like=node,
                label=short_label(info(node).module),
            )
        _absorb(node, new)
        node.replace_all_uses_with(new)
    for node in [n for n in graph.nodes if calls(n, aten.add)]:
        _added_positions(build, node, context)
    graph.eliminate_dead_code()
    return graph


def _absorb(rows: fx.Node, new: fx.Node) -> None:
    """Rows (T, D) or (1, T, D) are (B, T, D) now: what only gave them these axes goes."""
    shape = [str(size) for size in sizes(rows)]
    if len(shape) == 3 and shape[0] != "1":
        return
    for user in list(rows.users):
        wide = [str(size) for size in sizes(user)]
        if calls(user, *_WIDENING) and len(wide) == 3 and wide[1:] == shape[-2:]:
            _absorb(user, new)
            user.replace_all_uses_with(new)


def _padding(node: fx.Node) -> list[int]:
    """The row that gets no gradient, where there is one: torch's `padding_idx`."""
    padding = with_defaults(operands(node), None, None, -1)[2]
    return [padding] if padding >= 0 else []


def _position_offset(index: fx.Node, rows: int, context: Context) -> int | str:
    """c where the index is 0 1 2 ... + c in every sequence as long as the table's rows allow; else
    why not.
    """
    if not is_positional(index):
        return (
            "its index is neither the token ids nor consecutive positions: it computes with the "
            "ids or depends on a weight"
        )
    most = min(rows, context.facts.longest or rows)
    tried = [(2, min(SHORT, most))]
    offsets: list[int] = []
    for batch, length in tried:
        try:
            value = Evaluation(batch, length, context).of(index)
            starts = torch.broadcast_to(value, (batch, length)) - torch.arange(
                length, device=value.device
            )
        except _UNEVALUABLE as error:
            return f"its index cannot be evaluated from the sizes alone ({error})"
        if not bool((starts == starts[0, 0]).all()) or not 0 <= int(starts[0, 0]) < rows:
            return "its index is neither the token ids nor consecutive positions"
        offsets.append(int(starts[0, 0]))
        if len(offsets) == 1:  # now it is known how many rows are left
            longest = min(rows - offsets[0], most)
            tried += [(1, length) for length in (longest, *lengths_below(longest))]
    if len(set(offsets)) > 1:
        return "its positions depend on the length"
    if longest == rows - offsets[0] < SHORT and _goes_on(index, longest + 1, rows, context):
        return f"its index goes on behind the table's {rows} rows, and repeats some of them"
    return offsets[0]


def _goes_on(index: fx.Node, length: int, rows: int, context: Context) -> bool:
    """Whether the index names rows of the table where consecutive positions do no longer: then it
    counts something else, such as types of tokens.
    """
    try:
        value = Evaluation(1, length, context).of(index)
        named = torch.broadcast_to(value, (1, length))
    except _UNEVALUABLE:
        return False
    return bool(((named >= 0) & (named < rows)).all())


def _added_positions(build: Builder, node: fx.Node, context: Context) -> None:
    """x + p, where p is a slice of a table or arithmetic of the sizes."""
    for x, p in binary(node, aten.add):
        if (
            not isinstance(x, fx.Node)
            or not isinstance(p, fx.Node)
            or len(sizes(x)) != 3
            or is_positional(x)
            or is_weight(p)
        ):
            continue
        if sizes(p)[-1:] != sizes(x)[-1:] or len(sizes(p)) < 2:
            continue
        tables = [n for n in ancestors([p]) if is_weight(n)]
        if len(tables) > 1 or not is_positional(p, weights=True):
            continue
        with build.graph.inserting_before(node):
            new = (
                _computed(build, node, p, context)
                if not tables
                else _slice(build, node, p, tables[0], context)
            )
        if new is not None:
            node.args = (x, new) if node.args[0] is x else (new, x)
            return


def _computed(build: Builder, node: fx.Node, p: fx.Node, context: Context) -> fx.Node | None:
    """A table of the values of p."""
    length = evaluated_length(context)
    table = _rows(p, 1, length, context, {})
    for batch, n in ((2, min(SHORT, length)), *((1, n) for n in lengths_below(length))):
        if isinstance(table, str):
            break
        rows = _rows(p, batch, n, context, {})
        if isinstance(rows, str) or not torch.equal(table[:n], rows):
            table = (
                rows
                if isinstance(rows, str)
                else "what it adds depends on the length of the sequence"
            )
    if isinstance(table, str):
        info(node).refused = table
        return None
    info(node).refused = ""
    return read_table(build, context, table, "positions", node)


def _slice(
    build: Builder, node: fx.Node, p: fx.Node, table: fx.Node, context: Context
) -> fx.Node | None:
    """Rows of a learned table, found by putting random numbers in place of its entries."""
    shape = context.tensors[info(table).parameter or ""].shape
    if len(shape) < 2:
        return None  # a number, or one for each channel, that scales positions
    *leading, rows, width = shape
    if any(size != 1 for size in leading) or rows < 2:
        return None
    entries = torch.randn(
        rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    given = {table: entries.view(*leading, rows, width)}
    offset = _offset(_rows(p, 2, min(SHORT, rows), context, given), entries)
    longest = min(rows - (offset or 0), evaluated_length(context))
    if offset is None or any(
        _offset(_rows(p, 1, length, context, given), entries) != offset
        for length in (longest, *lengths_below(longest))
    ):
        info(node).refused = "what it adds is no table of positions, read from one row on"
        return None
    behind = _rows(p, 1, longest + 1, context, given) if longest == rows - offset < SHORT else ""
    if not isinstance(behind, str):
        info(node).refused = f"what it adds goes on behind the {rows} rows of its table"
        return None
    context.limit_positions(rows - offset)
    label = short_label(info(table).parameter or "positions")
    return build.call(embedding, table, build.input("position_ids"), offset, like=node, label=label)


def _offset(found: Tensor | str, entries: Tensor) -> int | None:
    """c where these are rows c, c + 1, ... of a table."""
    if isinstance(found, str):
        return None
    starts = (entries == found[0]).all(-1).nonzero()
    offset = int(starts[0]) if starts.numel() else -1
    return (
        offset
        if offset >= 0 and torch.equal(found, entries[offset : offset + len(found)])
        else None
    )


def _rows(
    p: fx.Node, batch: int, length: int, context: Context, given: dict[fx.Node, Tensor]
) -> Tensor | str:
    """(length, width) of p's value, the same for every sequence; else why not."""
    values = Evaluation(batch, length, context)
    for node, value in given.items():
        values.put(node, value)
    try:
        value = values.of(p)
        whole = value.expand(batch, length, value.shape[-1])
    except _UNEVALUABLE as error:
        return f"what it adds cannot be evaluated from the sizes alone ({error})"
    return (
        whole[0] if bool((whole == whole[:1]).all()) else "what it adds differs between sequences"
    )
