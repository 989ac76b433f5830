"""Graphs as plain data: what `graph.json` holds, what `tintc inspect` prints, and the way back.

A record keeps the operator's name, arguments, shape, origin and role of one node. Canonical and
lowered graphs are read back: only operators of the `tint` dialect (and the choice of one of several
results) are accepted.
"""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from tintc.ir.errors import ArtifactError
from tintc.ir.node_meta import KEY, NodeInfo, info
from tintc.ir.ops import OPERATORS

Kind = Literal["input", "parameter", "call", "output"]
_INFO_FIELDS = (
    "dtype",
    "module",
    "source",
    "parameter",
    "buffer",
    "slot",
    "trainable",
    "phase",
    "step",
)


@dataclass
class NodeRecord:
    """One node. args: JSON values, with {"node": name} for a node and {"repr": text} for what JSON
    has no form for (dtypes, infinities).
    """

    name: str
    kind: Kind
    operator: str
    args: list[Any]
    kwargs: dict[str, Any]
    shape: list[Any]
    info: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def inputs(self) -> list[str]:
        """Names of the nodes that this one reads, in order."""
        found: list[str] = []

        def visit(value: Any) -> None:
            if isinstance(value, dict) and set(value) == {"node"}:
                found.append(value["node"])
            elif isinstance(value, (list, dict)):
                for item in value.values() if isinstance(value, dict) else value:
                    visit(item)

        visit([self.args, self.kwargs])
        return list(dict.fromkeys(found))


def shape_text(shape: list[Any]) -> str:
    """[B, T, 768] -> (B, T, 768)."""
    return "(" + ", ".join(str(size) for size in shape) + ")"


_LONGEST_TEXT = 100


def argument_text(value: Any) -> str:
    """An argument of a record as Python would have it, nodes by their names."""
    if isinstance(value, dict):
        if set(value) == {"node"}:
            return str(value["node"])
        if set(value) == {"repr"}:
            return str(value["repr"])
        items = (f"{name!r}: {argument_text(item)}" for name, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(argument_text, value)) + "]"
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"<{len(value)} characters>"  # the program of an island
    return repr(value)


def arguments_text(record: NodeRecord) -> str:
    """All arguments of a call, those by name behind the others."""
    named = (f"{name}={argument_text(value)}" for name, value in record.kwargs.items())
    return ", ".join([*map(argument_text, record.args), *named])


def to_records(graph: fx.Graph) -> list[NodeRecord]:
    """Records of all nodes, in order."""
    symbols = _symbols(graph)
    return [_record(node, symbols) for node in graph.nodes]


def _record(node: fx.Node, symbols: dict[str, str]) -> NodeRecord:
    meta = info(node)
    kind: Kind = "call"
    if node.op == "placeholder":
        kind = "parameter" if meta.role == "parameter" else "input"
    elif node.op == "output":
        kind = "output"
    # Step 0 is kept: only what the record would have by default is left out.
    fields = {
        name: value
        for name in _INFO_FIELDS
        if (value := getattr(meta, name)) is not None and value is not False and value != ""
    }
    args = [] if node.op == "placeholder" else [_encode(a) for a in node.args]
    kwargs = {name: _encode(value) for name, value in node.kwargs.items()}
    return NodeRecord(
        node.name, kind, _operator_name(node), args, kwargs, _shape(node, symbols), fields
    )


def _operator_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_module":
        return type(node.graph.owning_module.get_submodule(str(node.target))).__name__  # type: ignore[union-attr]
    if node.op != "call_function":
        return str(node.op)
    if node.target is operator.getitem:
        return "getitem"
    return (
        str(node.target).removesuffix(".default")
        if str(node.target).startswith("tint.")
        else _aten_name(node.target)
    )


def _aten_name(function: Any) -> str:
    return (
        str(function)
        if isinstance(function, torch._ops.OpOverload)
        else str(getattr(function, "__name__", function))
    )


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _encode(item) for name, item in value.items()}
    if (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return {"repr": str(value)}


def _symbols(graph: fx.Graph) -> dict[str, str]:
    """torch.export's names of batch and tokens -> B and T."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "placeholder"
            and info(node).role == "input"
            and isinstance(value, Tensor)
            and value.ndim == 2
        ):
            return {str(value.shape[0]): "B", str(value.shape[1]): "T"}
    return {}


def _shape(node: fx.Node, symbols: dict[str, str]) -> list[Any]:
    shape = info(node).shape
    value = node.meta.get("val")
    if not shape and isinstance(value, Tensor):
        return [
            size if isinstance(size, int) else symbols.get(str(size), str(size))
            for size in value.shape
        ]
    return [list(size) if isinstance(size, tuple) else size for size in shape]


def from_records(records: list[dict[str, Any]]) -> fx.Graph:
    """The canonical or lowered graph of some records. Raises ArtifactError for an operator that is
    not in the dialect or a malformed record.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    try:
        for record in records:
            node = _build(graph, record, nodes)
            meta = NodeInfo(shape=_tuples(record["shape"]), **record["info"])
            if record["kind"] in ("input", "parameter"):
                meta.role = record["kind"]
            node.meta[KEY] = meta
            nodes[record["name"]] = node
        graph.lint()
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"graph.json is malformed ({type(error).__name__}: {error}); compile the model again"
        ) from error
    return graph


def _build(graph: fx.Graph, record: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    args = tuple(_decode(a, nodes) for a in record["args"])
    if record["kind"] in ("input", "parameter"):
        return graph.create_node("placeholder", record["name"], name=record["name"])
    if record["kind"] == "output":
        returned = tuple(args[0]) if isinstance(args[0], list) else args[0]  # JSON has no tuples
        node: fx.Node = graph.output(returned)
        return node
    name = record["operator"]
    if name == "getitem":
        return graph.create_node("call_function", operator.getitem, args, name=record["name"])
    short = name.removeprefix("tint.")
    if not name.startswith("tint.") or short not in OPERATORS:
        raise ArtifactError(
            f"graph.json holds the operator {name}, which is not in the tint dialect; the file was "
            "not written by tintc"
        )
    return graph.create_node("call_function", OPERATORS[short].target, args, name=record["name"])


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"node"}:
            return nodes[value["node"]]
        if set(value) == {"repr"}:
            raise ArtifactError(
                f"graph.json holds the argument {value['repr']}, which no tint operator takes"
            )
        return {name: _decode(item, nodes) for name, item in value.items()}
    return [_decode(item, nodes) for item in value] if isinstance(value, list) else value


def _tuples(shape: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(size) if isinstance(size, list) else size for size in shape)
