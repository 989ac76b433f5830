"""Tables of positions that passes compute: an embedding that nobody trains, read at `position_ids` like a model's own.

value (positions, width)  ->  tint.embedding(table, position_ids, 0)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tintc.compiler.builder import Builder
from tintc.compiler.dialect import is_tint
from tintc.compiler.inputs import table_name
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context


def read_table(build: Builder, context: Context, value: Tensor, label: str, like: fx.Node) -> fx.Node:
    """(B, T, width): the rows of the table at the positions of the tokens. Equal tables are one, and read once."""
    dtype = next(tensor.dtype for tensor in context.tensors.values() if tensor.is_floating_point())
    value = value.to(dtype).contiguous()
    name = next((name for name, table in context.tables.items() if torch.equal(table, value)), None)
    if name is None:
        name = table_name(len(context.tables))
        context.tables[name] = value
        table = build.placeholder(label, tuple(value.shape), role="parameter", parameter=name, buffer=True)
    else:
        table = next(n for n in build.graph.nodes if info(n).parameter == name)
    rows = next((user for user in table.users if is_tint(user, "embedding")), None)
    context.facts.max_positions = min(context.facts.max_positions or len(value), len(value))
    return rows or build.call("embedding", table, build.input("position_ids"), 0, like=like, label=f"{label}_rows")
