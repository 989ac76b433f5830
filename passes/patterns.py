"""Small questions that passes ask about aten graphs. Sizes come from the fake values that torch.export left."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tintc.compiler.builder import ancestors
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context

aten = torch.ops.aten
VIEWS = (aten.view, aten.reshape, aten._unsafe_view)


def calls(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of these operators; an overload packet stands for all its overloads."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return node.target in targets or (packet is not None and packet in targets)


def is_parameter(node: Any) -> bool:
    """Whether `node` is the placeholder of an auxiliary parameter or buffer."""
    return isinstance(node, fx.Node) and info(node).role == "parameter"


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of an aten node's value; symbolic ones are SymInts."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else tuple(info(node).shape)


def last_size(node: fx.Node) -> int | None:
    """The last size where it is a plain number."""
    shape = sizes(node)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def same_sizes(a: fx.Node, b: fx.Node) -> bool:
    """Whether both values have equal sizes, symbolic ones compared as expressions (no guard is added)."""
    return [str(s) for s in sizes(a)] == [str(s) for s in sizes(b)]


def number(value: Any) -> float | None:
    """A plain Python number, or None."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def binary(node: Any, *targets: Any) -> Iterator[tuple[Any, Any]]:
    """Both orders of the two arguments of a commutative call of one of the targets."""
    if calls(node, *targets) and len(node.args) == 2:
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def depends_on(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> bool:
    """Whether the node or anything before it satisfies `wanted`."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if wanted(current):
            return True
        stack += [n for n in current.all_input_nodes if n not in seen]
        seen.update(current.all_input_nodes)
    return False


_SIZE_ONLY = (
    *(aten.sym_size, aten.ones_like, aten.zeros_like, aten.full_like, aten.empty_like),
    *(aten.new_ones, aten.new_zeros, aten.new_full, aten.new_empty),
)


def reads_token_values(node: fx.Node) -> bool:
    """Whether the node's value depends on which tokens come in, not only on how many."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if info(current).role == "input":
            return True
        if current not in seen and not calls(current, *_SIZE_ONLY):
            stack += current.all_input_nodes
        seen.add(current)
    return False


def evaluate(node: fx.Node, batch: int, length: int, context: Context) -> Any:
    """Value of a node that depends on the inputs' sizes and on constants only (masks, positions), at these sizes."""
    weights = next(iter(context.tensors.values())).device
    device = torch.device("cpu") if weights.type == "meta" else weights
    input_ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
    values: dict[fx.Node, Any] = {}
    needed = ancestors([node])
    for current in node.graph.nodes:
        if current in needed:
            values[current] = _evaluate_one(current, input_ids, context.constants, values.__getitem__, device)
    return values[node]


def _evaluate_one(
    node: fx.Node, input_ids: Tensor, constants: dict[str, Tensor], lookup: Callable[[fx.Node], Any], device: torch.device
) -> Any:
    if node.op == "placeholder":
        return input_ids if info(node).role == "input" else constants[node.name].to(device)
    args = fx.node.map_arg(node.args, lookup)
    kwargs = fx.node.map_arg(node.kwargs, lookup)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": device}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def with_defaults(args: tuple[Any, ...], *defaults: Any) -> tuple[Any, ...]:
    """As many arguments as there are defaults: the given ones, then the last defaults."""
    return (*args, *defaults[len(args) :])[: len(defaults)]


def is_item(node: Any, source: fx.Node | None = None) -> bool:
    """Whether the node picks one result of another (of `source`, if given)."""
    return calls(node, operator.getitem) and (source is None or node.args[0] is source)
