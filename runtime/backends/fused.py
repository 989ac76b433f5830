"""The fused back end: lowers `tint` operators to plain torch calls.

Each operator's implementation in `ir/ops` is traced once into a new torch.fx graph,
with the ranks and dtypes that the graph records, so the result is straight-line torch code without
a branch: `program.code` is what runs. An operator that loops over chunks or sequences is one call
in it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from tintc.ir.dialect import operator_of
from tintc.ir.node_meta import Shape, copy_info, info, note_origin


class _TypedProxy(fx.Proxy):
    """A traced value whose rank, last size and dtype are known, so that operators can choose by
    them while traced.
    """

    def __init__(
        self, node: fx.Node, tracer: fx.proxy.TracerBase, shape: Shape, dtype: torch.dtype
    ) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(shape=shape, ndim=len(shape), dtype=dtype)


def emit(graph: fx.Graph, dtype: torch.dtype) -> fx.GraphModule:
    """A module that computes the graph's outputs, as a dict, from its placeholders, passed by
    name.
    """
    emitted = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(emitted)
    values: dict[fx.Node, Any] = {}

    def proxy(node: fx.Node) -> Any:
        value = values[node]
        return (
            _TypedProxy(value.node, tracer, info(node).shape, _dtype(node, dtype))
            if isinstance(value, fx.Proxy)
            else value
        )

    for node in graph.nodes:
        if node.op == "placeholder" and node.users:
            made = emitted.create_node("placeholder", node.name, name=node.name)
            copy_info(node, made)
            values[node] = fx.Proxy(made, tracer)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        last = next(iter(reversed(emitted.nodes)))
        values[node] = _trace(node, fx.node.map_arg(node.args, proxy), emitted, tracer)
        if isinstance(values[node], fx.Proxy) and values[node].node.op != "placeholder":
            values[node].node._rename(node.name)
        note_origin(emitted, last, node)
    emitted.output(fx.node.map_arg(graph.output_node().args[0], lambda n: values[n].node))
    emitted.eliminate_dead_code()  # an operator may compute two things of which the graph wants one
    return fx.GraphModule(nn.Module(), emitted, class_name="FusedProgram")


def _trace(
    node: fx.Node, args: tuple[Any, ...], emitted: fx.Graph, tracer: fx.proxy.TracerBase
) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    called = operator_of(node)
    assert called is not None
    if called.whole:
        plain = fx.node.map_aggregate(args, lambda x: x.node if isinstance(x, fx.Proxy) else x)
        return fx.Proxy(emitted.call_function(called.implementation, plain), tracer)
    return called(*args)


def _dtype(node: fx.Node, dtype: torch.dtype) -> torch.dtype:
    return {"float": dtype, "int": torch.int64, "bool": torch.bool}[info(node).dtype]
