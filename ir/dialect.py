"""The `tint` dialect: what an operator is, and what passes ask about a call of one.

The operators themselves stand in `ir/ops`, one file a family, each declared once with `@operator`.
They are registered with torch.library, so a lowered graph is an ordinary fx graph: it prints, runs,
takes fake tensors and can be differentiated from outside. Each has a shape rule, from which passes
know all shapes without running anything. The two back ends, `runtime/backends/fused.py` and
`runtime/backends/transformer`, only replace operators; their meaning is fixed in `ir/ops`.

`tintc.ir.ops.OPERATORS` is the table of all operators. There is none here: this module is imported
before they are declared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from types import MappingProxyType
from typing import Any, Generic, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from torch import fx

from tintc.ir.errors import CompilerBug
from tintc.ir.node_meta import DType, Shape, info

P = ParamSpec("P")
R = TypeVar("R")

Kind = Literal["read", "forward", "backward", "descent", "optimization"]
ShapeRule: TypeAlias = "Callable[..., Shape | tuple[Shape, ...]]"


@dataclass(frozen=True, eq=False)
class Operator(Generic[P, R]):
    """An operator of the dialect. A call of it runs its implementation.

    kind: what it is for, from which follows what rules it needs (see `rules.RuleTable`):

    - `read`: weights, tables and masks; no gradient passes through it
    - `forward`: a part of the model, which needs a backward rule; its backward pass may call it too
    - `backward`: gradients
    - `descent`: a new value of a weight
    - `optimization`: the fused back end puts it in place of others, for one kind of call
    """

    name: str
    schema: str  # as torch.library takes it, behind the name
    implementation: Callable[P, R]
    shape: ShapeRule  # arguments, with shapes in place of tensors -> shape, or one for each output
    meaning: str  # in one line
    kind: Kind
    dtype: DType | None  # of the result; None: that of the first argument
    # The arguments that are tensors of another kind than float; "any": of several kinds.
    takes: Mapping[str, DType | Literal["any"]]
    weights: tuple[str, ...]  # arguments that descents update
    whole: bool  # its implementation loops: emitted code calls it instead of tracing it
    wide: bool  # its result is at least in float32, whatever the weights' type (`precision`)

    def __post_init__(self) -> None:
        shown = {key: getattr(self.implementation, key) for key in _SHOWN}
        self.__dict__.update(shown, __wrapped__=self.implementation)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.implementation(*args, **kwargs)

    def __repr__(self) -> str:
        return f"tint.{self.name}"

    @property
    def target(self) -> Any:
        """The torch operator `tint::name`, which graphs call."""
        return getattr(torch.ops.tint, self.name).default

    @property
    def family(self) -> str:
        """The file that declares it: linear, norm, attention, ..."""
        return str(self.__module__).rpartition(".")[2]


AnyOperator: TypeAlias = Operator[..., Any]
_SHOWN = ("__doc__", "__module__", "__name__", "__qualname__")
_LIBRARY: Any = torch.library.Library("tint", "DEF")  # type: ignore[no-untyped-call]
_BY_NAME: dict[str, AnyOperator] = {}
_BY_TARGET: dict[Any, AnyOperator] = {}


def operator(
    schema: str,
    *,
    shape: ShapeRule,
    meaning: str,
    kind: Kind = "forward",
    dtype: DType | None = "float",
    takes: Mapping[str, DType | Literal["any"]] = MappingProxyType({}),
    weights: tuple[str, ...] = (),
    whole: bool = False,
    wide: bool = False,
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Declares the operator that the decorated function implements; the name is the function's.

    The function is made of plain torch operations and leaves its arguments alone. See `Operator`
    for the rest. Raises CompilerBug for a name that there is already.
    """

    def declare(implementation: Callable[P, R]) -> Operator[P, R]:
        name = implementation.__name__
        if name in _BY_NAME:
            raise CompilerBug(f"tint.{name} is declared twice")
        _LIBRARY.define(name + schema)
        # Composite: torch sees through the operator, so fake tensors, autograd and export need
        # nothing more.
        _LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")
        # Descents, their rates among them, change weights by less than half precision tells apart.
        of_descent = wide or kind == "descent"
        declared = Operator(
            name, schema, implementation, shape, meaning, kind, dtype, takes, weights, whole,
            of_descent,
        )  # fmt: skip
        _BY_NAME[name] = _BY_TARGET[declared.target] = declared
        return declared

    return declare


def declared() -> Mapping[str, AnyOperator]:
    """The operators that are declared so far, by name. Complete as `tintc.ir.ops.OPERATORS`."""
    return MappingProxyType(_BY_NAME)


def operator_of(node: fx.Node) -> AnyOperator | None:
    """The operator that a node calls; None for a node that calls no `tint` operator."""
    return _BY_TARGET.get(node.target) if node.op == "call_function" else None


def has_several(called: AnyOperator) -> bool:
    """Whether it gives several results, of which a graph picks items."""
    returned = called.target._schema.returns
    return len(returned) > 1 or str(returned[0].type) == "List[Tensor]"


def tint_name(node: fx.Node) -> str | None:
    """`linear_forward` for a call of `tint::linear_forward`; None for any other node."""
    found = operator_of(node)
    return found.name if found is not None else None


def is_recognized(node: fx.Node) -> bool:
    """Whether the node calls a `tint` operator, or picks a result of one."""
    if node.op == "call_function" and node.target is getitem:
        node = node.all_input_nodes[0]
    return operator_of(node) is not None


def is_tint(node: fx.Node, *operators: AnyOperator) -> bool:
    """Whether the node calls one of these operators."""
    return operator_of(node) in operators


def is_wide(node: fx.Node) -> bool:
    """Whether the value is at least in float32: an own value of a slot, a state, a rate."""
    called = operator_of(node)
    return info(node).wide if called is None else called.wide


def argument(node: fx.Node, name: str) -> Any:
    """The argument of a `tint` call by its schema name; None where it was left out."""
    schema = node.target._schema  # type: ignore[union-attr]
    position = [a.name for a in schema.arguments].index(name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def with_arguments(node: fx.Node, changed: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a `tint` call, some of them changed, by their schema names."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return tuple(changed.get(name, value) for name, value in zip(names, node.args, strict=False))
