"""The fused back end: lowers `tint` operators to plain torch calls.

Each operator's implementation in `runtime/primitives` is traced once into a new torch.fx graph, with the
ranks and dtypes that the lowered graph records, so the result is straight-line torch code without a branch:
`program.code` is what runs. Only what the wanted outputs need is emitted.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from tintc.compiler.builder import ancestors
from tintc.compiler.builder import outputs as named_outputs
from tintc.compiler.dialect import OPERATORS, tint_name
from tintc.compiler.node_meta import Shape, info

OUTPUTS = ("logits", "initial_logits", "updates")


class _TypedProxy(fx.Proxy):
    """A traced value whose rank, last size and dtype are known, so that primitives can choose by them while traced."""

    def __init__(self, node: fx.Node, tracer: fx.proxy.TracerBase, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(shape=shape, ndim=len(shape), dtype=dtype)


def emit(graph: fx.Graph, outputs: Sequence[str], dtype: torch.dtype, *, from_updates: bool = False) -> fx.GraphModule:
    """A module that computes some of OUTPUTS, as a dict, from the lowered graph's placeholders, passed by name.

    from_updates: the updated slot values are inputs too (named like their nodes) and no training happens.
    """
    returned = named_outputs(graph)
    wanted: dict[str, Any] = {name: value for name, value in returned.items() if name in outputs}
    given = set(returned["updates"].values()) if from_updates else set()
    roots: list[fx.Node] = []
    fx.node.map_arg(wanted, roots.append)
    needed = ancestors(roots, stop=given)
    emitted = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(emitted)
    values: dict[fx.Node, Any] = {}

    def proxy(node: fx.Node) -> Any:
        value = values[node]
        return _TypedProxy(value.node, tracer, info(node).shape, _dtype(node, dtype)) if isinstance(value, fx.Proxy) else value

    for node in [n for n in graph.nodes if n in needed and (n.op == "placeholder" or n in given)]:
        values[node] = fx.Proxy(emitted.create_node("placeholder", node.name, name=node.name), tracer)
    for node in graph.nodes:
        if node in values or node not in needed:
            continue
        values[node] = _trace(node, fx.node.map_arg(node.args, proxy))
        if isinstance(values[node], fx.Proxy) and values[node].node.op != "placeholder":
            values[node].node._rename(node.name)
    emitted.output(fx.node.map_arg(wanted, lambda n: values[n].node))
    emitted.eliminate_dead_code()  # a primitive may compute two things of which the graph wants one
    return fx.GraphModule(nn.Module(), emitted, class_name="FusedProgram")


def _trace(node: fx.Node, args: tuple[Any, ...]) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    name = tint_name(node)
    assert name is not None
    return OPERATORS[name].implementation(*args)


def _dtype(node: fx.Node, dtype: torch.dtype) -> torch.dtype:
    return {"float": dtype, "int": torch.int64, "bool": torch.bool}[info(node).dtype]
