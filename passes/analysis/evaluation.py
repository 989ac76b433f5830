"""Values of what depends on the inputs' sizes alone: masks, positions, rotary tables, constants.

Such arithmetic is evaluated, not matched: whatever gives the causal mask is the causal mask,
however a model writes it.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from tintc.ir.builder import ancestors, input_node
from tintc.ir.context import Context
from tintc.ir.dialect import tint_name
from tintc.ir.node_meta import info
from tintc.passes.analysis.patterns import aten, calls, function_of, sizes

_LIKE = (
    aten.ones_like,
    aten.zeros_like,
    aten.full_like,
    aten.empty_like,
    aten.new_ones,
    aten.new_zeros,
    aten.new_full,
    aten.new_empty,
)
SIZE_ONLY = (aten.sym_size, *_LIKE)  # these read the sizes of a value alone


# what depends on positions is evaluated up to this length; nothing is claimed of longer sequences
LONGEST = 4096
SHORT = 7  # where one further length is enough


def evaluated_length(context: Context) -> int:
    """The longest sequence at which positions are evaluated: the model's own limit, or LONGEST."""
    return min(context.facts.longest or LONGEST, LONGEST)


def lengths_below(longest: int) -> list[int]:
    """Where a rule is looked at again, beside the longest sequence: every length up to 64, then
    two an octave up to 1024. What is not the same rule everywhere depends on the length and is
    refused.
    """
    ladder = [length for power in range(6, 11) for length in (2**power, 3 * 2 ** (power - 1))]
    return [length for length in (*range(2, 64), *ladder) if length < min(longest, 1025)]


# What torch calls in a size: `arange` of floats has CeilToInt(FloatTrueDiv(...)) numbers.
_ARITHMETIC: dict[str, Any] = {
    "Max": max,
    "Min": min,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "TruncToInt": math.trunc,
    "ToFloat": torch.sym_float,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "CeilDiv": lambda a, b: -(-a // b),
}


def sizes_at(source: fx.Node, batch: Any, tokens: Any) -> list[Any]:
    """The sizes of a value for so many sequences and tokens, which may be symbols: numbers, or
    expressions in both, as torch.export or the passes left them.
    """
    ids = input_node(source.graph, "input_ids").meta["val"]
    known = {str(ids.shape[0]): batch, str(ids.shape[1]): tokens, "B": batch, "T": tokens}
    names: dict[str, Any] = {"__builtins__": {}, **_ARITHMETIC}
    names |= {name: size for name, size in known.items() if name.isidentifier()}
    texts = [(size, str(size)) for size in sizes(source)]
    return [
        known[text] if text in known else size if isinstance(size, int) else eval(text, names)
        for size, text in texts
    ]


def is_weight(node: Any) -> bool:
    """Whether `node` is the placeholder of an auxiliary parameter; buffers are constants."""
    return isinstance(node, fx.Node) and info(node).role == "parameter" and not info(node).buffer


def is_positional(node: fx.Node, *, weights: bool = False) -> bool:
    """Whether the node's value depends on how many tokens come in only: not on which, and, unless
    `weights`, on no weight.
    """
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if (
            tint_name(current)
            or (is_weight(current) and not weights)
            or (info(current).role == "input" and current.name == "input_ids")
        ):
            return False
        if not calls(current, *SIZE_ONLY):
            stack += current.all_input_nodes
    return True


def reads_weights(node: fx.Node) -> bool:
    """Whether the node's value depends on an auxiliary parameter."""
    return any(is_weight(n) for n in ancestors([node]))


class Evaluation:
    """Values at one batch and length, on the CPU, each computed once. Raises what torch raises for
    a node that is not positional.
    """

    def __init__(self, batch: int, length: int, context: Context) -> None:
        self.batch, self.length, self._context = batch, length, context
        self._values: dict[fx.Node, Any] = {}

    def of(self, value: Any) -> Any:
        """The value of a node, or of arguments that hold nodes."""
        return fx.node.map_arg(value, self._node)

    def put(self, node: fx.Node, value: Any) -> None:
        """Takes `value` for the node instead of computing it."""
        self._values[node] = value

    def _node(self, node: fx.Node) -> Any:
        stack = [node]
        while stack:  # depth first, without Python's limit of recursion
            current = stack[-1]
            missing = [n for n in self._read(current) if n not in self._values]
            if missing:
                stack += missing
                continue
            stack.pop()
            if current not in self._values:
                self._values[current] = self._compute(current)
        return self._values[node]

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values are needed for the node's own."""
        if node in self._values or node.op == "placeholder":
            return []
        return node.all_input_nodes[1:] if calls(node, *SIZE_ONLY) else node.all_input_nodes

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        source: Any = node.args[0] if node.args else None
        if calls(node, aten.sym_size):
            return self._shape(source)[node.args[1]]  # type: ignore[index]
        if calls(node, *_LIKE):
            given = torch.empty(self._shape(source), dtype=source.meta["val"].dtype)
            args, kwargs = (given, *self.of(node.args[1:])), self.of(node.kwargs)
        else:
            args, kwargs = self.of(node.args), self.of(node.kwargs)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _to_cpu)
        return function_of(node)(*args, **kwargs)

    def _shape(self, source: Any) -> list[int]:
        return [int(size) for size in sizes_at(source, self.batch, self.length)]

    def _placeholder(self, node: fx.Node) -> Tensor:
        record = info(node)
        if record.role == "input":
            return torch.zeros(self.batch, self.length, dtype=torch.int64)
        found = (
            self._context.tensors.get(record.parameter or "")
            if record.buffer
            else self._context.constants.get(node.name)
        )
        if found is None:
            raise TypeError(f"{node.name} is a weight")
        return found.cpu()


def constant(value: Any, context: Context) -> float | None:
    """A number: a plain one, or a tensor of one element that is the same at all sizes tried. None
    for anything else.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node) or not is_positional(value):
        return None
    found = value.meta.get("val")
    if not isinstance(found, Tensor) or any(
        not isinstance(size, int) or size != 1 for size in found.shape
    ):
        return None
    try:
        tried: list[tuple[int, int]] = [(1, 3)]
        if any(info(n).role == "input" for n in ancestors([value])):
            longest = evaluated_length(context)
            tried = [(2, 5), (1, longest), *((1, length) for length in lengths_below(longest))]
        numbers = {float(Evaluation(batch, length, context).of(value)) for batch, length in tried}
    except (TypeError, RuntimeError, KeyError, IndexError):
        return None
    return numbers.pop() if len(numbers) == 1 else None


def _to_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def evaluable(nodes: list[fx.Node], length: int, context: Context) -> Evaluation:
    """Values at the greatest length, up to the given one, at which all nodes have one: a buffer
    that they read may have fewer rows.

    Raises what torch raises where there is no such length.
    """
    constants = [n for n in ancestors(nodes) if n.op == "placeholder" and info(n).role != "input"]
    rows = {
        size
        for n in constants
        for size in n.meta["val"].shape
        if isinstance(size, int) and size < length
    }
    failure: Exception | None = None
    for tried in (length, *sorted(rows, reverse=True)):
        values = Evaluation(1, tried, context)
        try:
            for node in nodes:
                values.of(node)
        except (RuntimeError, IndexError) as error:
            failure = failure or error
            continue
        return values
    assert failure is not None
    raise failure
