"""Small questions that passes ask about aten graphs. Sizes come from the fake values that
torch.export left.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tintc.ir.builder import input_node
from tintc.ir.node_meta import copy_info, info

aten = torch.ops.aten
VIEWS = (aten.view, aten.reshape, aten._unsafe_view)
LAYOUT = (  # what only rearranges numbers
    *(
        *VIEWS,
        aten.transpose,
        aten.swapaxes,
        aten.movedim,
        aten.mT,
        aten.permute,
        aten.t,
        aten.expand,
        aten.broadcast_to,
        aten.unsqueeze,
    ),
    *(
        aten.squeeze,
        aten.slice,
        aten.select,
        aten.flatten,
        aten.unflatten,
        aten.repeat,
        aten.repeat_interleave,
        aten.contiguous,
    ),
    *(
        aten.clone,
        aten.index,
        aten.flip,
        aten.roll,
        aten.split,
        aten.split_with_sizes,
        aten.chunk,
        aten.unbind,
        operator.getitem,
    ),
)


def function_of(node: fx.Node) -> Any:
    """What to call for the node's value. A view is a reshape: strides, which copies that were
    stripped had made fit, mean nothing here.
    """
    return aten.reshape.default if calls(node, *VIEWS) else node.target


def calls(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of these operators; an overload packet stands for all its
    overloads.
    """
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
    """Whether both values have equal sizes, symbolic ones compared as expressions (no guard is
    added).
    """
    return [str(s) for s in sizes(a)] == [str(s) for s in sizes(b)]


def is_of_tokens(node: fx.Node) -> bool:
    """Whether the value is (B, T, width): batch and tokens as the input has them, and a plain
    number.
    """
    shape = [str(size) for size in sizes(node)]
    leading = [str(size) for size in sizes(input_node(node.graph, "input_ids"))]
    return (
        len(shape) == 3 and isinstance(sizes(node)[-1], int) and shape[:2] in (leading, ["B", "T"])
    )


def is_whole(node: fx.Node) -> bool:
    """Whether the leading sizes are batch and tokens as the input has them, or 1; of one token a
    sequence they are not.
    """
    leading = [str(size) for size in sizes(input_node(node.graph, "input_ids"))]
    found = [str(size) for size in sizes(node)[:2]]
    allowed = [(size, name, "1") for size, name in zip(leading, "BT", strict=True)]
    whole = all(size in each for size, each in zip(found, allowed, strict=False))
    return whole and (found[1:] != ["1"] or found[0] == "1")


def called_like(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call that stands where `like` does in the model, with its value from those of its
    arguments; put where the graph inserts.
    """
    new = like.graph.call_function(target, args, kwargs)
    new.meta.update(like.meta)
    copy_info(like, new)
    given, named = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
    new.meta["val"] = target(*given, **named)
    return new


def number(value: Any) -> float | None:
    """A plain Python number, or None."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def binary(node: Any, *targets: Any) -> Iterator[tuple[Any, Any]]:
    """Both orders of the two arguments of a commutative call of one of the targets; of none with
    further options.
    """
    if calls(node, *targets) and len(node.args) == 2 and not node.kwargs:
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def with_defaults(args: tuple[Any, ...], *defaults: Any) -> tuple[Any, ...]:
    """As many arguments as there are defaults: the given ones, then the last defaults."""
    return (*args, *defaults[len(args) :])[: len(defaults)]
