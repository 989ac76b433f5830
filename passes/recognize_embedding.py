"""Token and position embeddings.

    embedding(table, input_ids)                               ->  tint.embedding(table, input_ids, 0)
    embedding(table, arithmetic of the sizes = 0 1 2 ... + c) ->  tint.embedding(table, position_ids, c)

The arithmetic is evaluated, not matched: whatever gives consecutive positions is a position. The simulator
owns positions (padding, restarts), so the graph gets a `position_ids` input in its place.
"""

from __future__ import annotations

import torch
from torch import fx

from tintc.compiler.builder import Builder, operands, short_label
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass
from tintc.passes.patterns import aten, calls, depends_on, evaluate, is_parameter, reads_token_values


@graph_pass(requires=("well_formed",), ensures=("well_formed",))
def recognize_embedding(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Sets facts.hidden, facts.vocab_size and facts.max_positions."""
    build = Builder(graph)
    tokens = next(n for n in graph.nodes if info(n).role == "input")
    for node in [n for n in graph.nodes if calls(n, aten.embedding)]:
        table, index = operands(node)[:2]
        if not is_parameter(table):
            info(node).refused = "its table is not in the state dict; expected a parameter or a persistent buffer"
            continue
        if index is tokens:
            rows, width = context.tensors[info(table).parameter or ""].shape
            context.facts.vocab_size = min(rows, context.facts.vocab_size or rows)
            context.facts.hidden = max(width, context.facts.hidden)
            index_node, offset = tokens, 0
        else:
            rows = context.tensors[info(table).parameter or ""].shape[0]
            found = _position_offset(index, rows, context)
            if isinstance(found, str):
                info(node).refused = found
                continue
            index_node, offset = build.input("position_ids"), found
            context.facts.max_positions = min(rows - offset, context.facts.max_positions or rows)
        with graph.inserting_before(node):
            new = build.call("embedding", table, index_node, offset, like=node, label=short_label(info(node).module))
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    return graph


def _position_offset(index: fx.Node, rows: int, context: Context) -> int | str:
    """c where the index is 0 1 2 ... + c in every sequence as long as the table's rows allow; else why not."""
    if depends_on(index, lambda n: is_parameter(n)):
        return "its index depends on a weight; expected token ids or positions"
    if reads_token_values(index):
        return "its index is neither the token ids nor consecutive positions: it computes with the ids"
    offsets: list[int] = []
    for batch in (2, 1):
        longest = min(rows, context.facts.max_positions or rows)
        length = min(rows - offsets[0], longest) if offsets else min(7, longest)
        try:
            value = evaluate(index, batch, length, context)
            starts = torch.broadcast_to(value, (batch, length)) - torch.arange(length, device=value.device)
        except (RuntimeError, TypeError, KeyError) as error:
            return f"its index cannot be evaluated from the sizes alone ({error})"
        if not bool((starts == starts[0, 0]).all()) or not 0 <= int(starts[0, 0]) < rows:
            return "its index is neither the token ids nor consecutive positions"
        offsets.append(int(starts[0, 0]))
    return offsets[0] if offsets[0] == offsets[1] else "its positions depend on the length"
