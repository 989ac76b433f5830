"""The ONNX graph under construction, and `Value`: what torch code computes on while it is written
down as ONNX.

A Value answers torch's functions, methods and operators (`__torch_function__`) by adding nodes to
its graph, so the very code that a simulator runs writes the export. It knows its dtype and its
dimensions: numbers, or names of those that differ from call to call. A value that depends on
constants alone carries its number and adds no node before somebody needs it as an input.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tintc.ir.errors import UnsupportedModelError

Dim = int | str

TYPES: dict[torch.dtype, int] = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}
BATCH, TOKENS, SEGMENT = "batch", "sequence", "segment"
PAST, KEPT = "past", "kept"  # of a stream's window: earlier tokens, those where loss stands
_NAMELESS = "graph"
_REPEATED = 64  # numbers; more that are all the same are written once, and repeated when it runs


class Graph:
    """Nodes and weights so far. Equal nodes are added once; so are equal constants, and views of
    one tensor.

    operators: name of a torch function -> what adds its nodes. weights: by the names that they have
    in the file.
    """

    def __init__(self, opset: int, operators: dict[str, Callable[..., Any]]) -> None:
        self.opset, self.operators = opset, operators
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, Tensor] = {}
        self.sizes: dict[str, Value] = {}  # of each named dimension, as a vector of one number
        self.islands: dict[Any, onnx.ModelProto] = {}  # exported by themselves
        self._scope = _NAMELESS
        self._body: list[onnx.NodeProto] = []  # of the loop that is being written
        self._inside: set[str] = set()  # what depends on the values that it carries
        self._names: Counter[str] = Counter()
        self._same: dict[Any, Value] = {}
        self._constants: dict[Any, str] = {}
        self._made: dict[str, tuple[str, Value | None, dict[str, Any]]] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes added inside are called `name/OperatorType`."""
        outer, self._scope = self._scope, name or _NAMELESS
        yield
        self._scope = outer

    def input(
        self, name: str, dims: Sequence[Dim], dtype: torch.dtype, default: Tensor | None = None
    ) -> Value:
        """A new input of the model. default: its value where the caller gives none."""
        found = Value(self, name, tuple(dims), dtype)
        self.inputs.append(found.described())
        if default is not None:
            self.weights[name] = default
        return found

    def weight(self, name: str, tensor: Tensor) -> Value:
        """A weight of the model, kept as it is; the same view of a tensor is kept once, under the
        name that it got first.
        """
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self._constants:
            self._constants[key] = self._unused(name)
            self.weights[self._constants[key]] = tensor.detach()
        return Value(self, self._constants[key], tuple(tensor.shape), tensor.dtype)

    def constant(self, number: Any, dtype: torch.dtype | None = None) -> Value:
        """A value known now."""
        tensor = torch.as_tensor(number, dtype=dtype).detach()
        return Value(self, "", tuple(tensor.shape), tensor.dtype, tensor)

    def ints(self, *numbers: int) -> Value:
        """A vector of whole numbers: axes, shapes, bounds."""
        return self.constant(torch.tensor(numbers, dtype=torch.int64))

    def add(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        dims: Sequence[Dim],
        dtype: torch.dtype,
        **attributes: Any,
    ) -> Value:
        """One node with one output."""
        names = [self.name_of(value) for value in inputs]
        key = (kind, tuple(names), dtype, repr(sorted(attributes.items())))
        if key not in self._same:
            name = self._unused(f"{self._scope}/{kind}")
            self._append(helper.make_node(kind, names, [name], name=name, **attributes))
            self._same[key] = Value(self, name, tuple(dims), dtype)
            self._made[name] = kind, next(iter(inputs), None), attributes
        return self._same[key]

    def source(self, x: Value, kind: str, **attributes: Any) -> Value | None:
        """The first input of the node that gave x, if it is one of this kind."""
        made, first, having = self._made.get(x.name, ("", None, {}))
        return first if (made, having) == (kind, attributes) else None

    def join(self, nodes: Iterable[onnx.NodeProto], names: dict[str, str]) -> None:
        """Adds nodes of another graph. names: of its values in this one; those of the nodes'
        results are added.
        """
        for node in nodes:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            read = [names[name] if name else "" for name in node.input]
            made = [self._unused(f"{self._scope}/{node.op_type}") for _ in node.output]
            names.update(zip(node.output, made, strict=True))
            copied.name = made[0]
            del copied.input[:], copied.output[:], copied.metadata_props[:]
            copied.input.extend(read)
            copied.output.extend(made)
            self._append(copied)

    def _append(self, node: onnx.NodeProto) -> None:
        """Into the body of a loop if it depends on what the loop carries: all else runs once."""
        if self._inside.isdisjoint(node.input):
            self.nodes.append(node)
        else:
            self._body.append(node)
            self._inside.update(node.output)

    def loop(self, times: int, first: Values, step: Callable[[Value, Values], Values]) -> Values:
        """Values by name after so many steps. step: takes the number of the step, from 0, and the
        values before it, and gives those after it, of the same dimensions.

        A standard Loop, whose body holds what differs from step to step, and nothing else.
        """
        number, goes_on = (
            self._carried(name, (), dtype)
            for name, dtype in (("step", torch.int64), ("goes_on", torch.bool))
        )
        before = {name: self._carried(name, x.dims, x.dtype) for name, x in first.items()}
        after = [goes_on, *step(number, before).values()]
        taken, returned = [number, goes_on, *before.values()], []
        for old, new in zip(taken[1:], after, strict=True):
            name = self._unused(f"{old.name}_after")
            self._body.append(helper.make_node("Identity", [self.name_of(new)], [name], name=name))
            returned.append(Value(self, name, old.dims, old.dtype))
        names = [value.name for value in returned]
        body = helper.make_graph(
            _needed(self._body, names), "step", [v.described() for v in taken],
            [v.described() for v in returned],
        )  # fmt: skip
        self._body, self._inside = [], set()
        inputs = [self.constant(times), self.constant(True), *first.values()]
        results = [
            Value(self, self._unused(f"{old.name}_at_last"), old.dims, old.dtype)
            for old in before.values()
        ]
        node = helper.make_node(
            "Loop", [self.name_of(x) for x in inputs], [x.name for x in results],
            name="steps/Loop", body=body,
        )  # fmt: skip
        self._append(node)
        return dict(zip(first, results, strict=True))

    def _carried(self, name: str, dims: Sequence[Dim], dtype: torch.dtype) -> Value:
        found = Value(self, self._unused(f"steps/{name}"), tuple(dims), dtype)
        self._inside.add(found.name)
        return found

    def rename(self, value: Value, name: str) -> Value:
        """An output of the model by its own name."""
        self.nodes.append(
            helper.make_node("Identity", [self.name_of(value)], [name], name=f"{_NAMELESS}/{name}")
        )
        return Value(self, name, value.dims, value.dtype)

    def prune(self, outputs: Sequence[str]) -> None:
        """Drops nodes and weights that none of these outputs depends on."""
        self.nodes = _needed(self.nodes, outputs)
        needed = {name for node in self.nodes for name in _read(node)}
        self.weights = {name: tensor for name, tensor in self.weights.items() if name in needed}

    def size(self, dim: Dim) -> Value:
        """A dimension as a vector of one number; `3*segment` is a multiple of a named one."""
        if isinstance(dim, int):
            return self.ints(dim)
        if dim not in self.sizes:
            times, _, name = dim.partition("*")
            self.sizes[dim] = self.add(
                "Mul", [self.ints(int(times)), self.sizes[name]], (1,), torch.int64
            )
        return self.sizes[dim]

    def shape(self, dims: Sequence[Dim]) -> Value:
        """A vector of dimensions."""
        if all(isinstance(dim, int) for dim in dims):
            return self.ints(*(int(dim) for dim in dims))
        return self.add(
            "Concat", [self.size(dim) for dim in dims], (len(dims),), torch.int64, axis=0
        )

    def refuse(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._scope} needs {what}, which has no form in the standard operators of ONNX that "
            "tintc writes; nothing was exported"
        )

    def name_of(self, value: Value | None) -> str:
        if value is None:
            return ""
        if value.known is None:
            return value.name
        tensor = value.known.contiguous()
        key = (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.cpu().flatten().view(torch.uint8).numpy().tobytes(),
        )
        if key not in self._constants:
            if tensor.dtype not in TYPES:
                raise self.refuse(f"numbers of type {tensor.dtype}")
            if tensor.numel() > _REPEATED and bool((tensor == tensor.flatten()[0]).all()):
                one, dims = self.constant(tensor.flatten()[0]), value.dims
                return self.add("Expand", [one, self.shape(dims)], dims, value.dtype).name
            self._constants[key] = self._unused(f"{self._scope}/constant")
            self.weights[self._constants[key]] = tensor
        return self._constants[key]

    def _unused(self, name: str) -> str:
        name = re.sub(r"\s", "_", name)
        self._names[name] += 1
        return name if self._names[name] == 1 else self._unused(f"{name}_{self._names[name]}")


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that any of these outputs depends on."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= _read(node)
    return kept[::-1]


def _read(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those inside of a loop included."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return set(node.input).union(*(_read(inner) for body in bodies for inner in body.node))


class Value:
    """A tensor of the model. known: its number, where it depends on constants alone."""

    requires_grad = False

    def __init__(
        self,
        graph: Graph,
        name: str,
        dims: tuple[Dim, ...],
        dtype: torch.dtype,
        known: Tensor | None = None,
    ) -> None:
        self.graph, self.name, self.dims, self.dtype, self.known = graph, name, dims, dtype, known

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return call(function.__name__, args, kwargs or {}, function)

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.dims

    @property
    def ndim(self) -> int:
        return len(self.dims)

    def described(self) -> onnx.ValueInfoProto:
        """Name, type and dimensions."""
        return helper.make_tensor_value_info(self.name, TYPES[self.dtype], list(self.dims))

    @property
    def mT(self) -> Any:
        return self.transpose(-1, -2)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self.graph.operators:
            raise AttributeError(name)
        return lambda *args, **kwargs: call(name, (self, *args), kwargs, getattr(Tensor, name))


Values = dict[str, Value]


def call(name: str, args: Any, kwargs: Any, function: Any) -> Any:
    """What a torch function gives: a number if all arguments are, else the value of nodes that are
    added.
    """
    found: list[Any] = []
    _leaves([*args, *kwargs.values()], found)
    values = [leaf for leaf in found if isinstance(leaf, Value)]
    graph = values[0].graph
    if all(value.known is not None for value in values) and not any(
        isinstance(leaf, str) for leaf in found
    ):
        plain = [_map(list(args)), _map(kwargs)]
        result = function(*plain[0], **plain[1])
        return graph.constant(result) if isinstance(result, Tensor) else result
    operator = graph.operators.get(name)
    if operator is None:
        raise graph.refuse(f"torch.{name}")
    return operator(graph, *args, **kwargs)


def _leaves(value: Any, found: list[Any]) -> None:
    if isinstance(value, (list, tuple)):
        for item in value:
            _leaves(item, found)
    elif isinstance(value, slice):
        _leaves([value.start, value.stop, value.step], found)
    else:
        found.append(value)


def _map(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item) for item in value)
    if isinstance(value, dict):
        return {key: _map(item) for key, item in value.items()}
    return value.known if isinstance(value, Value) else value


def _dunder(name: str, *, swapped: bool = False) -> Callable[..., Any]:
    method = getattr(Tensor, f"__{name}__")

    def apply(self: Value, *args: Any) -> Any:
        operands = (*args, self) if swapped else (self, *args)
        function = getattr(operator, name) if swapped else method
        return call(f"__{name}__", operands, {}, function)

    return apply


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "pow",
    "and",
    "or",
    "eq",
    "ne",
    "gt",
    "ge",
    "neg",
    "invert",
    "getitem",
):
    setattr(Value, f"__{_name}__", _dunder(_name))
for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(Value, f"__r{_name}__", _dunder(_name, swapped=True))
Value.__hash__ = object.__hash__  # type: ignore[method-assign]  # == gives a Value
