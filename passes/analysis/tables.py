"""Tables of positions that passes compute: an embedding that nobody trains, read at `position_ids`
like a model's own.

value (positions, width)  ->  tint.embedding(table, position_ids, 0)
a cos(p f), f and a of the length of the call
  ->  tint.wave(at_length(f, text_length), at_length(a, text_length), position_ids, "cos")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tintc.ir.builder import Builder
from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, is_tint
from tintc.ir.inputs import LENGTH, is_wide_table, table_name
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding
from tintc.ir.ops.position import at_length, wave
from tintc.ir.precision import HALF
from tintc.passes.analysis.frequencies import Rows, Wave


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
    table = _table(build, context, value, label, wide=wide)
    context.limit_positions(len(value))
    return _once(build, embedding, (table, build.input("position_ids"), 0), like, f"{label}_rows")


def read_wave(build: Builder, context: Context, found: Wave, label: str, like: fx.Node) -> fx.Node:
    """(B, T, R): what a wave is at the positions of the tokens, in a call of its length. Equal
    waves are read once.
    """
    if not context.facts.by_length:
        context.learn(by_length=info(like).module or "the model")
    frequency, amplitude = (
        _row(build, context, rows, f"{label}_{name}", like)
        for rows, name in ((found.frequency, "frequencies"), (found.amplitude, "amplitudes"))
    )
    args = (frequency, amplitude, build.input("position_ids"), found.function)
    return _once(build, wave, args, like, f"{label}_rows")


def _row(build: Builder, context: Context, rows: Rows, label: str, like: fx.Node) -> fx.Node:
    """(B, 1, R): of the call's length."""
    table = _table(build, context, rows.table, label, wide=True)
    args = (table, build.input(LENGTH), rows.first)
    return _once(build, at_length, args, like, f"{label}_of_call")


def _once(
    build: Builder, called: AnyOperator, args: tuple[Any, ...], like: fx.Node, label: str
) -> fx.Node:
    """A call of an operator; the one that there is, of these arguments."""
    for user in args[0].users:
        if is_tint(user, called) and user.args == args:
            found: fx.Node = user
            return found
    return build.call(called, *args, like=like, label=label)


def _table(build: Builder, context: Context, value: Tensor, label: str, *, wide: bool) -> fx.Node:
    """The placeholder of a table of that value; equal tables are one."""
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
    if name is not None:
        known: fx.Node = next(n for n in build.graph.nodes if info(n).parameter == name)
        return known
    name = table_name(len(context.tables), wide=wide)
    context.add_table(name, value)
    return build.placeholder(
        label, tuple(value.shape), role="parameter", parameter=name, buffer=True
    )
