"""What tintc writes on a graph node: one typed record under `node.meta["tint"]`.

field: what it means (who writes it)

shape, dtype: sizes: int, or B (batch), T (tokens), S (training segment) (whoever creates the node
    (`builder.Builder`))
module, source: path of the auxiliary module; file and line that wrote the operator (capture)
role: of a placeholder: `input` or `parameter` (capture, lower_forward, `passes/analysis/tables.py`)
buffer: of a placeholder: a buffer of the model, or a table of positions; never trained (capture,
    `passes/analysis/tables.py`)
parameter: of a placeholder: its name in the auxiliary state dict, or a table's name (capture,
    lower_forward, `passes/analysis/tables.py`)
slot: name of the prefix slot whose value this node is; of the inner rule's own values too
    (recognize_linear, recognize_norm, select_trainable, build_descent)
trainable: of a `tint.prefix`: descent updates it (select_trainable)
phase: forward, backward or descent (lower_forward, build_backward, build_descent, truncate_segment)
step: inner step that the node belongs to; the last forward pass has step = config.steps (the same,
    and unroll_steps)
refused: of an operator left alone: why its pattern was not accepted (canonicalize, recognize_*)
barred: of an operator left alone: why it can be part of no island (form_islands)
wide: of a placeholder: what is passed is at least in float32 (given_updates, `optimize.py` and
    `folding.py` of `runtime/specialize`)
gradient: node that holds dL/d(this node); build_descent reads and clears it (build_backward)
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import fx

Size = int | str
Shape = tuple[Size, ...]
DType = Literal["float", "int", "bool"]
Phase = Literal["forward", "backward", "descent"]

KEY = "tint"
_TERM = re.compile(r"(?=.)(\d*)([A-Za-z]\w*)?")


@dataclass
class NodeInfo:
    """See the table above."""

    shape: Shape = ()
    dtype: DType = "float"
    module: str = ""
    source: str = ""
    role: Literal["input", "parameter"] | None = None
    parameter: str | None = None
    buffer: bool = False
    slot: str | None = None
    trainable: bool = False
    phase: Phase | None = None
    step: int | None = None
    refused: str = ""
    barred: str = ""
    wide: bool = False
    gradient: fx.Node | None = None


def info(node: fx.Node) -> NodeInfo:
    """The node's record. Nodes straight from torch.export get an empty one at first use."""
    found = node.meta.setdefault(KEY, NodeInfo())
    assert isinstance(found, NodeInfo)
    return found


def copy_info(source: fx.Node, target: fx.Node, **changes: object) -> None:
    """Gives `target` its own copy of the record of `source`, with changes."""
    target.meta[KEY] = dataclasses.replace(info(source), **changes)  # type: ignore[arg-type]


def note_origin(graph: fx.Graph, behind: fx.Node, origin: fx.Node) -> None:
    """Gives what was emitted for a node, all behind `behind`, its module, source line, phase and
    step; the node of the same name has its shape too.
    """
    for node in reversed(graph.nodes):
        if node is behind:
            return
        shape = info(origin).shape if node.name == origin.name else ()
        copy_info(origin, node, shape=shape, gradient=None)


def shapes_of(node: fx.Node) -> list[Shape]:
    """Of its value, or of each of its values."""
    shape = info(node).shape
    if shape and isinstance(shape[0], (tuple, list)):
        return [tuple(each) for each in shape]
    return [shape]


def side_by_side(sizes: Sequence[Size]) -> Size:
    """Of values that are concatenated: S and 2S -> 3S, 2S and L -> 2S+L. Raises ValueError for
    sizes that have no sum.
    """
    counts: Counter[str] = Counter()
    for size in sizes:
        terms = _terms(size)
        if terms is None:
            raise ValueError(f"sizes {', '.join(map(str, sizes))} cannot be added")
        counts.update(terms)
    number = counts.pop("", 0)
    named = [f"{'' if count == 1 else count}{name}" for name, count in counts.items()]
    if not named:
        return number
    return "+".join([*named, str(number)] if number else named)


def size_of(dimension: Size, sizes: Mapping[str, int]) -> int:
    """Of a shape's dimension: a number, or a sum of several B, T and S; any other name counts as
    T.
    """
    if isinstance(dimension, int):
        return dimension
    terms = _terms(dimension)
    if terms is None:
        return sizes["T"]
    other = sizes["T"]
    return sum(n * (sizes.get(name, other) if name else 1) for name, n in terms.items())


@cache
def _terms(size: Size) -> Mapping[str, int] | None:
    """How often each name stands in a size, and under no name its number; None of what is no
    sum.
    """
    counts: Counter[str] = Counter()
    for term in str(size).split("+"):
        found = _TERM.fullmatch(term)
        if found is None:
            return None
        counts[found[2] or ""] += int(found[1] or 1)
    return counts
