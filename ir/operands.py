"""Whether the calls of a graph are given what their operators take.

Passes build no other calls, but an artifact may hold any: shape rules and torch's kernels are asked
only once these hold. Each function returns the problems that it found.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx

from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, argument, has_several, is_tint, operator_of
from tintc.ir.inputs import INPUTS, LENGTH, OPTIONAL_INPUTS
from tintc.ir.layout import PrefixSlot, Rows, beside
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding, embedding_descent, segment
from tintc.ir.ops.linear import prefix
from tintc.ir.ops.states import (
    adam_descent,
    change_square,
    descend,
    divide,
    fade,
    moment,
    toward,
    zero_state,
)

_LARGEST = 2**31  # of a whole number: sizes, heads, rows
_OF_ONE_WEIGHT = (fade, descend, toward, change_square, moment, adam_descent, divide)
Problems = list[str]


def operands_fit(graph: fx.Graph, context: Context) -> Problems:
    """Every call has as many arguments as its schema, of its types; inputs are the known ones; no
    call is of an operator that only an optimization puts there.
    """
    return [problem for node in graph.nodes for problem in _problems_of(node)]


def _problems_of(node: fx.Node) -> Problems:
    if node.op == "placeholder":
        return _of_placeholder(node)
    if node.op != "call_function":
        return []
    if node.kwargs:
        return [f"{node.name} has arguments by name"]
    if node.target is operator.getitem:
        return _of_item(node)
    called = operator_of(node)
    if called is None:
        return [f"{node.name} calls {node.target}"]
    if called.kind == "optimization":
        return [f"{node.name} calls {called}, which only an optimized program does"]
    expected = called.target._schema.arguments
    given = [a for i, a in enumerate(expected) if i < len(node.args) or not a.has_default_value()]
    if len(given) != len(node.args):
        return [f"{node.name} has {len(node.args)} arguments; {called} takes {len(expected)}"]
    problems = [
        f"{node.name} has {value!r} as its {wanted.name}; {called} takes {wanted.real_type}"
        for wanted, value in zip(given, node.args, strict=True)
        if not _fits(value, str(wanted.real_type), _dtype(called, wanted.name))
    ]
    return problems or _of_result(node, called)


def _of_placeholder(node: fx.Node) -> Problems:
    found = info(node)
    if found.role == "parameter":
        return [] if isinstance(found.parameter, str) else [f"{node.name} is no weight's value"]
    known = (INPUTS | OPTIONAL_INPUTS).get(node.name)
    if found.role != "input" or known != (found.shape, found.dtype):
        return [f"{node.name} is no input of a lowered graph"]
    return []


def _of_item(node: fx.Node) -> Problems:
    source, index = node.args if len(node.args) == 2 else (None, None)
    called = operator_of(source) if isinstance(source, fx.Node) else None
    several = isinstance(source, fx.Node) and called is not None and has_several(called)
    results = len(info(source).shape) if several else 0  # type: ignore[arg-type]
    fits = type(index) is int and 0 <= index < results
    return [] if fits else [f"{node.name} picks no result of several"]


def _of_result(node: fx.Node, called: AnyOperator) -> Problems:
    first = node.args[0]
    dtype = called.dtype or (info(first).dtype if isinstance(first, fx.Node) else None)
    if info(node).dtype != dtype:
        return [f"{node.name} is said to be {info(node).dtype}; {called} gives {dtype}"]
    return []


def _dtype(called: AnyOperator, name: str) -> str | None:
    """Of an argument that is a tensor; None for any."""
    first = called.target._schema.arguments[0].name
    return None if called.dtype is None and name == first else called.takes.get(name, "float")


def _fits(value: Any, kind: str, dtype: str | None) -> bool:
    """Whether a value is of a schema's type, in torch's spelling."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1], dtype)
    if kind.startswith("List["):
        each_kind = kind[len("List[") : -1]
        return isinstance(value, list) and all(_fits(each, each_kind, dtype) for each in value)
    if kind == "Tensor" or isinstance(value, fx.Node):
        return _is_tensor(value, kind, dtype)
    if kind == "float":
        return type(value) in (int, float) and math.isfinite(value)
    if kind == "int":
        return type(value) is int and abs(value) < _LARGEST
    return (kind == "bool" and type(value) is bool) or (kind == "str" and type(value) is str)


def _is_tensor(value: Any, kind: str, dtype: str | None) -> bool:
    """A node with one result, of this kind of number; for an `int` a single one."""
    if not isinstance(value, fx.Node) or kind not in ("Tensor", "int"):
        return False
    called = operator_of(value)
    several = called is not None and has_several(called)
    single = kind == "Tensor" or info(value).shape == ()
    return not several and single and dtype in (None, "any", info(value).dtype)


def slots_fit(graph: fx.Graph, context: Context) -> Problems:
    """Every read of a slot is of the rows that the layout has for it, values of a slot have its
    shape, inner rules mix what stands beside one weight alone, tables have a row for every token id
    and position, and lengths are read only where calls have some.
    """
    slots = context.layout.prefix if context.layout is not None else {}
    problems = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.name == LENGTH and not context.facts.by_length:
            problems.append(f"{node.name} is read, and calls of this model have no length")
        if is_tint(node, prefix):
            slot = slots.get(info(node).slot or "")
            names = ("start", "stop", "period", "transpose")
            start, stop, period, transpose = (argument(node, name) for name in names)
            parameter = info(argument(node, "parameter")).parameter
            if slot is None or (slot.parameter, slot.rows, slot.transpose, slot.shape) != (
                parameter,
                Rows(start, stop, period),
                transpose,
                info(node).shape,
            ):
                problems.append(f"{node.name} reads other rows than its slot {info(node).slot} has")
        elif is_tint(node, embedding, embedding_descent):
            problems += _rows_missing(node, context)
        problems += _of_another_slot(node, slots)
    return problems


def _of_another_slot(node: fx.Node, slots: dict[str, PrefixSlot]) -> Problems:
    """Of a value of a slot."""
    slot = slots.get(info(node).slot or "")
    if slot is not None and info(node).shape not in (slot.shape, ("B", *slot.shape)):
        return [f"{node.name} has another shape than its slot {slot.name}"]
    if is_tint(node, zero_state) and not (slot is not None and slot.zero):
        return [f"{node.name} is zero and its slot {info(node).slot} is not"]
    if not is_tint(node, *_OF_ONE_WEIGHT):
        return []
    named = (info(n).slot or "" for n in (node, *node.all_input_nodes))
    mixed = {beside(name) or name for name in named if name in slots}
    return [] if len(mixed) < 2 else [f"{node.name} mixes {' and '.join(sorted(mixed))}"]


def _rows_missing(node: fx.Node, context: Context) -> Problems:
    index, facts = argument(node, "index"), context.facts
    while is_tint(index, segment):
        index = argument(index, "x")
    needed = {"input_ids": facts.vocab_size, "position_ids": facts.longest}.get(index.name)
    rows = info(argument(node, "table")).shape[-2]
    if needed is None or not isinstance(rows, int) or rows < needed + argument(node, "offset"):
        return [f"{node.name} reads row {needed or index.name} of a table of {rows}"]
    return []
