"""What an island computes, as plain data: aten operators over one sequence, forward and backward.

An island is a region of the model that no pass recognises. Its program is JSON text, an argument of
the `tint.island_...` operators, so a graph that is saved or copied holds all of it:

    {"inputs": [port, ...], "widths": [W, ...],
     "forward": {"nodes": [[operator, args, kwargs], ...], "results": [index, ...]},
     "backward": {...}}

Value i is input i, then node i - inputs. The backward part reads the gradients of the results
first, then the inputs, and gives a gradient for every input that has one. Sizes are those of one
sequence: T tokens; `torch.vmap` runs it over a batch. An artifact may come from anybody: only
operators of an allow-list are taken, which read tensors and make tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from tintc.ir.island_operators import function_of_name, name_of
from tintc.ir.precision import dtype_name, wide_dtype

Kind = Literal["tokens", "ids", "weight", "constant"]
_aten = torch.ops.aten

OWN = "own"  # the float type that the island computes in, wherever a type is named
OWN_COMPLEX = "own complex"
_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.complex64, torch.complex128),
    )
}
_FORMATS = {str(f): f for f in (torch.contiguous_format, torch.preserve_format)}
_DROPPED = ("layout", "pin_memory")  # strided, not pinned: what they are without a word
_CHECKED = ((2, 9), (3, 12))  # sequences and tokens at which shapes are looked at


class Port(NamedTuple):
    """One input. shape: of one sequence, without its tokens: (W,) of an activation, () of ids; of
    a weight that of its slot; of a constant its own. dtype: of a constant.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: str = OWN

    @property
    def learns(self) -> bool:
        """Whether there is a gradient at it."""
        return self.kind in ("tokens", "weight")


class Ref(NamedTuple):
    """The value with that number."""

    number: int


class Own(NamedTuple):
    """The island's own float type, or its device, as an argument. complex: of such numbers."""

    device: bool
    complex: bool = False

    def among(self, device: torch.device, dtype: torch.dtype) -> torch.device | torch.dtype:
        """Which of the two it stands for."""
        return device if self.device else dtype.to_complex() if self.complex else dtype


class Node(NamedTuple):
    """A call."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any


@dataclass(frozen=True, eq=False)  # one program, one object
class Part:
    """Nodes in order, and which values are the results; None where there is none."""

    inputs: int
    nodes: tuple[Node, ...]
    results: tuple[int | None, ...]

    def run(
        self, values: Sequence[Any], dtype: torch.dtype, wanted: frozenset[int] | None = None
    ) -> list[Any]:
        """The results, of which only the wanted are computed; the others are None."""
        device = next(value.device for value in values if isinstance(value, Tensor))
        needed = self._needed(wanted)
        found: list[Any] = list(values)
        for index, node in enumerate(self.nodes, len(values)):
            if index not in needed:
                found.append(None)
                continue

            def value(leaf: Any) -> Any:
                if isinstance(leaf, Ref):
                    return found[leaf.number]
                return leaf.among(device, dtype) if isinstance(leaf, Own) else leaf

            args, kwargs = _mapped(node.args, value), _mapped(node.kwargs, value)
            found.append(node.function(*args, **kwargs))
        return [None if i not in needed else found[i] for i in self.results if i is not None]

    @lru_cache(maxsize=64)  # noqa: B019 (parts are few, and live as long as their programs)
    def _needed(self, wanted: frozenset[int] | None) -> frozenset[int]:
        results = [i for i in self.results if i is not None]
        pending = [i for at, i in enumerate(results) if wanted is None or at in wanted]
        needed: set[int] = set()
        while pending:
            index = pending.pop()
            if index not in needed:
                needed.add(index)
                if index >= self.inputs:
                    node = self.nodes[index - self.inputs]
                    _mapped((node.args, node.kwargs), lambda leaf: _refer(leaf, pending))
        return frozenset(needed)


def _refer(leaf: Any, into: list[int]) -> Any:
    if isinstance(leaf, Ref):
        into.append(leaf.number)
    return leaf


@dataclass(frozen=True)
class Island:
    """A program, read. widths: last sizes of the results."""

    inputs: tuple[Port, ...]
    widths: tuple[int, ...]
    forward: Part
    backward: Part

    @property
    def learning(self) -> tuple[int, ...]:
        """The inputs that have a gradient, in order."""
        return tuple(i for i, port in enumerate(self.inputs) if port.learns)


def own_dtype(values: Sequence[Tensor], inputs: Sequence[Port]) -> torch.dtype:
    """What an island computes in: the type of its inputs, at least float32."""
    first = next(v for v, p in zip(values, inputs, strict=True) if p.learns)
    return wide_dtype(first.dtype)


@lru_cache(maxsize=4096)
def read(text: str) -> Island:
    """The island of a program's text. Raises ValueError for anything that is none."""
    try:
        found = json.loads(text)
        inputs = tuple(_port(*port) for port in found["inputs"])
        widths = tuple(_whole(width) for width in found["widths"])
        forward = _part(found["forward"], len(inputs))
        backward = _part(found["backward"], len(inputs) + len(widths))
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"a malformed island ({type(error).__name__}: {error})") from error
    island = Island(inputs, widths, forward, backward)
    _check(island)
    return island


def write(inputs: Sequence[Port], widths: Sequence[int], forward: str, backward: str) -> str:
    """The text of a program; both parts as `written` gives them."""
    ports = json.dumps([list(port) for port in inputs], separators=(",", ":"))
    sizes = json.dumps(list(widths), separators=(",", ":"))
    return f'{{"inputs":{ports},"widths":{sizes},"forward":{forward},"backward":{backward}}}'


def written(graph: fx.Graph, own: torch.dtype) -> str:
    """A traced graph as the text of a part. own: the float type that it was traced in.

    Raises ValueError, naming it, for an operator that an island cannot hold.
    """
    index = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    nodes = []
    for node in graph.nodes:
        if node.op == "call_function":
            target, args, kwargs = _spelled(node)
            encoded = [_encoded(leaf, index, own) for leaf in args]
            named = {
                name: _encoded(leaf, index, own)
                for name, leaf in kwargs.items()
                if name not in _DROPPED and leaf is not None
            }
            index[node] = len(index)
            nodes.append([name_of(target), encoded, named])
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"{node.op} {node.target}")
    returned: Any = graph.output_node().args[0]
    results = [None if node is None else index[node] for node in returned]
    return json.dumps({"nodes": nodes, "results": results}, separators=(",", ":"))


def _spelled(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call, in a spelling that depends on no strides and leaves no number undefined."""
    if node.target in (_aten.view.default, _aten._unsafe_view.default):
        return _aten.reshape.default, node.args, node.kwargs
    if node.target is _aten.unfold.default:
        return _aten.unfold_copy.default, node.args, node.kwargs
    if node.target is _aten.empty_permuted.default:
        return _aten.full.default, (node.args[0], 0), node.kwargs
    if node.target is _aten.empty.memory_format:
        return _aten.full.default, (node.args[0], 0), node.kwargs
    return node.target, node.args, node.kwargs


def _encoded(leaf: Any, index: dict[fx.Node, int], own: torch.dtype) -> Any:
    """An argument as JSON."""
    if isinstance(leaf, (list, tuple)):
        return [_encoded(each, index, own) for each in leaf]
    if isinstance(leaf, fx.Node):
        return {"v": index[leaf]}
    if isinstance(leaf, torch.dtype):
        of_complex = leaf == own.to_complex()
        return {"dtype": OWN_COMPLEX if of_complex else OWN if leaf == own else dtype_name(leaf)}
    if isinstance(leaf, torch.device):
        return {"device": OWN}
    if isinstance(leaf, torch.memory_format):
        return {"memory_format": str(leaf)}
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return {"float": str(leaf)}
    if isinstance(leaf, complex):
        return {"complex": str(leaf)}
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return leaf
    raise ValueError(f"an argument {leaf}")


def _part(found: Any, inputs: int) -> Part:
    nodes: list[Node] = []
    for name, args, kwargs in found["nodes"]:
        known = inputs + len(nodes)
        arguments = [_decoded(leaf, known) for leaf in args]
        named = {str(key): _decoded(leaf, known) for key, leaf in kwargs.items()}
        nodes.append(Node(function_of_name(name), arguments, named))
    every = inputs + len(nodes)
    results = [None if i is None else _whole(i) for i in found["results"]]
    if any(i is not None and i >= every for i in results):
        raise ValueError("an island returns a value that there is not")
    return Part(inputs, tuple(nodes), tuple(results))


def _decoded(leaf: Any, known: int) -> Any:
    if isinstance(leaf, list):
        return [_decoded(each, known) for each in leaf]
    if not isinstance(leaf, dict):
        return leaf
    ((kind, value),) = leaf.items()
    if kind == "v" and _whole(value) < known:
        return Ref(value)
    if kind == "dtype":
        if value in (OWN, OWN_COMPLEX):
            return Own(device=False, complex=value == OWN_COMPLEX)
        return _DTYPES[value]
    if kind == "device":
        return Own(device=True)
    if kind == "memory_format":
        return _FORMATS[value]
    if kind in ("float", "complex"):
        return {"float": float, "complex": complex}[kind](value)
    raise ValueError(f"an argument {leaf}")


def _port(kind: Kind, shape: list[int], dtype: str) -> Port:
    if kind not in ("tokens", "ids", "weight", "constant"):
        raise ValueError(f"an input of kind {kind!r}")
    if dtype not in (OWN, OWN_COMPLEX, *_DTYPES):
        raise ValueError(f"an input of type {dtype!r}")
    return Port(kind, tuple(_whole(size) for size in shape), dtype)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no size")
    return value


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if type(value) in (list, tuple):
        return [_mapped(each, leaf) for each in value]
    if type(value) is dict:
        return {name: _mapped(each, leaf) for name, each in value.items()}
    return leaf(value)


def constant_dtype(port: Port, own: torch.dtype) -> torch.dtype:
    """The type in which a constant is read."""
    if port.dtype == OWN_COMPLEX:
        return own.to_complex()
    return own if port.dtype == OWN else _DTYPES[port.dtype]


def _check(island: Island) -> None:
    """Shapes of what it gives, at a few sizes. Raises ValueError where they are not what its ports
    say.
    """
    if not island.learning or not island.widths:
        raise ValueError("an island without an input that learns, or without a result")
    kinds = [port.kind for port in island.inputs]
    if "tokens" not in kinds and "ids" not in kinds:
        raise ValueError("an island that reads no token")
    for batch, tokens in _CHECKED:
        values = [_like(port, batch, tokens) for port in island.inputs]
        gradients = [torch.empty(batch, tokens, w, device="meta") for w in island.widths]
        wanted = [(batch, tokens, width) for width in island.widths]
        back = [tuple(values[i].shape) for i in island.learning]
        try:
            given = [tuple(x.shape) for x in batched(island.forward, values, island.inputs)]
            ports = [*(Port("tokens", (w,)) for w in island.widths), *island.inputs]
            found = batched(island.backward, [*gradients, *values], ports)
            returned = [tuple(x.shape) for x in found]
        except Exception as error:  # whatever a kernel raises for operands that do not fit
            raise ValueError(f"an island that does not run: {error}") from error
        if given != wanted or returned != back:
            raise ValueError(f"an island gives {given}, {returned}; expected {wanted}, {back}")


def _like(port: Port, batch: int, tokens: int) -> Tensor:
    if port.kind == "constant":
        return torch.empty(port.shape, dtype=constant_dtype(port, torch.float32), device="meta")
    if port.kind == "ids":
        return torch.empty(batch, tokens, dtype=torch.int64, device="meta")
    sizes = (tokens, *port.shape) if port.kind == "tokens" else port.shape
    return torch.empty(batch, *sizes, device="meta")


def batched(
    part: Part,
    values: Sequence[Tensor],
    ports: Sequence[Port],
    wanted: frozenset[int] | None = None,
) -> list[Tensor]:
    """The results of a part for every sequence. A weight without a sequence's axis is shared."""
    dtype = own_dtype(values, ports)
    own = [
        value.to(constant_dtype(port, dtype))
        if port.kind == "constant"
        else (value if port.kind == "ids" else value.to(dtype))
        for value, port in zip(values, ports, strict=True)
    ]
    axes = tuple(
        None
        if port.kind == "constant" or (port.kind == "weight" and value.ndim == len(port.shape))
        else 0
        for value, port in zip(own, ports, strict=True)
    )
    chosen = range(sum(i is not None for i in part.results))
    kept = [i for i in chosen if wanted is None or i in wanted]

    def one(*sequence: Tensor) -> tuple[Tensor, ...]:
        found = part.run(sequence, dtype, wanted)
        return tuple(found[i] for i in kept)

    given: tuple[Tensor, ...] = torch.vmap(one, in_dims=axes)(*own)
    return list(given)
