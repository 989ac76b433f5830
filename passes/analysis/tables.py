"""Tables of positions that passes compute: an embedding that nobody trains, read at `position_ids`
like a model's own.

value (positions, width)  ->  tint.embedding(table, position_ids, 0)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tintc.ir.builder import Builder
from tintc.ir.context import Context
from tintc.ir.dialect import is_tint
from tintc.ir.inputs import is_wide_table, table_name
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding
from tintc.ir.precision import HALF


def read_table(
    build: Builder,
    context: Context,
    value: Tensor,
    label: str,
    like: fx.Node,
    *,
    wide: bool = False,
) -> fx.Node:
    """(B, T, width): the rows of the table at the positions of the tokens. Equal tables are one,
    and read once.

    wide: at least in float32, whatever the type of the weights is.
    """
    dtype = next(tensor.dtype for tensor in context.tensors.values() if tensor.is_floating_point())
    value = value.to(torch.float32 if wide and dtype in HALF else dtype).contiguous()
    name = next(
        (
            name
            for name, table in context.tables.items()
            if is_wide_table(name) == wide and torch.equal(table, value)
        ),
        None,
    )
    if name is None:
        name = table_name(len(context.tables), wide=wide)
        context.add_table(name, value)
        table = build.placeholder(
            label, tuple(value.shape), role="parameter", parameter=name, buffer=True
        )
    else:
        table = next(n for n in build.graph.nodes if info(n).parameter == name)
    rows = next((user for user in table.users if is_tint(user, embedding)), None)
    context.limit_positions(len(value))
    return rows or build.call(
        embedding, table, build.input("position_ids"), 0, like=like, label=f"{label}_rows"
    )
