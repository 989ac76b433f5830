"""Reads of parameters through prefix slots: a slot whole, or the rows of one that a layer needs."""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.builder import Builder, short_label
from tintc.ir.dialect import argument, is_tint, tint_name
from tintc.ir.layout import Rows
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward, prefix, slot_shape
from tintc.passes.analysis.coordinates import Untraceable


def take_rows(build: Builder, root: fx.Node, rows: Rows) -> fx.Node:
    """The coordinates `rows` of an activation: itself, or a layer with these rows of its weight and
    bias.

    Raises Untraceable where there is no layer to take them from.
    """
    if tint_name(root) is None:
        raise Untraceable(f"it reads {root.target}, which was not recognised")
    if (rows.start, rows.stop) == (0, info(root).shape[-1]):
        return root
    weight, bias = (
        (argument(root, name) for name in ("weight", "bias"))
        if is_tint(root, linear_forward)
        else (None, None)
    )
    if weight is None or not is_tint(weight, prefix):
        raise Untraceable(f"it reads a part of {root.name}; expected parts of linear layers only")
    rows = _within(
        Rows(*(argument(weight, name) for name in ("start", "stop", "period"))),
        rows,
        info(root).shape[-1],
    )
    parameters = [None if read is None else argument(read, "parameter") for read in (weight, bias)]
    with build.graph.inserting_before(root):
        w = read_slot(build, root, parameters[0], rows, argument(weight, "transpose"))  # type: ignore[arg-type]
        b = None if parameters[1] is None else read_slot(build, root, parameters[1], rows, False)
        x = argument(root, "x")
        for user in x.users:
            if (
                is_tint(user, linear_forward)
                and argument(user, "weight") is w
                and argument(user, "bias") is b
            ):
                taken: fx.Node = user
                return taken
        label = f"{root.name}_{rows.start}_{rows.stop}"
        return build.call(
            linear_forward, x, w, b, like=root, label=label, shape=("B", "T", info(w).shape[0])
        )


def _within(whole: Rows, part: Rows, size: Any) -> Rows:
    """The rows of a parameter that are the rows `part` of a layer which reads its rows `whole`,
    `size` in number.
    """
    if (whole.start, whole.stop) == (0, whole.period):
        return part
    if part.period != size or whole.stop - whole.start != size:
        raise Untraceable("it reads a part that repeats of a part of a layer")
    return Rows(whole.start + part.start, whole.start + part.stop, whole.period)


def read_slot(
    build: Builder, reader: fx.Node, parameter: fx.Node, rows: Rows, transpose: bool
) -> fx.Node:
    """A `tint.prefix` read of some rows of a parameter; the slot is called after the parameter and
    the rows.

    A slot that several layers share is read once, where the first of them, `reader` or another,
    needs it.
    """
    name = info(parameter).parameter or ""
    shape = slot_shape(info(parameter).shape)  # of a table (1, V, D), (V, D)
    total = shape[1 if transpose else 0]
    slot = rows.label(name, total)
    shared = [
        n for n in parameter.users if info(n).slot == slot and argument(n, "transpose") is transpose
    ]
    if shared:
        if reader < shared[0]:
            reader.prepend(shared[0])
        return shared[0]
    label = short_label(name if slot == name else f"{name}_{rows.start}_{rows.stop}")
    where = (rows.start, rows.stop, rows.period, transpose)
    return build.call(
        prefix, parameter, *where, label=label, slot=slot, module=name.rpartition(".")[0]
    )
