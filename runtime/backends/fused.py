"""The fused back end: lowers `tint` operators to plain torch calls.

Each operator's implementation in `ir/ops` is traced once into a new torch.fx graph,
with the ranks and dtypes that the graph records, so the result is straight-line torch code without
a branch: `program.code` is what runs. An operator that loops over chunks or sequences is one call
in it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from tintc.ir.builder import remove_dead
from tintc.ir.dialect import argument, is_tint, is_wide, operator_of
from tintc.ir.node_meta import Shape, copy_info, info, note_origin
from tintc.ir.ops.embedding import embedding
from tintc.ir.ops.in_place import IN_PLACE
from tintc.ir.ops.island import island_backward, island_forward
from tintc.ir.ops.linear import prefix, stack_rows
from tintc.ir.ops.onednn import onednn_product
from tintc.ir.ops.position import wave
from tintc.ir.outputs import Output
from tintc.ir.precision import HALF, wide_dtype
from tintc.passes.stream.cached_keys import cached_dtype

_OF_WEIGHTS = (prefix, stack_rows)  # give weights of the type that they get
_CONVERT = (onednn_product,)  # read weights of the stored type, and convert them themselves
_WRITTEN = (Output.LOGITS.into, Output.INITIAL_LOGITS.into)


class _TypedProxy(fx.Proxy):
    """A traced value whose rank, last size and dtype are known, so that operators can choose by
    them while traced.
    """

    def __init__(
        self, node: fx.Node, tracer: fx.proxy.TracerBase, shape: Shape, dtype: torch.dtype
    ) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(shape=shape, ndim=len(shape), dtype=dtype)


def emit(
    graph: fx.Graph,
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
    over: Collection[fx.Node] = (),
) -> fx.GraphModule:
    """A module that computes the graph's outputs, as a dict, from its placeholders, passed by
    name.

    dtype: of what is computed. stored: of weights and of what a call passes and returns, but for
    losses and what is wide; default the same. A weight is converted where it is read, one at a
    time. over: descents that write over the weight that they get.
    """
    return _Emission(dtype, stored or dtype, over).module(graph)


class _Emission:
    """The emitted graph while it is made."""

    def __init__(self, dtype: torch.dtype, stored: torch.dtype, over: Collection[fx.Node]) -> None:
        self.dtype, self.stored, self.over = dtype, stored, over
        self.emitted = fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.emitted)
        self.values: dict[fx.Node, Any] = {}
        self.as_stored: set[fx.Node] = set()  # values that are of the stored type

    def module(self, graph: fx.Graph) -> fx.GraphModule:
        for node in graph.nodes:
            if node.op == "placeholder" and node.users:
                self._pass(node)
        for node in graph.nodes:
            if node.op == "call_function":
                self._call(node)
        self.emitted.output(self._returned(graph.output_node().args[0]))
        # an operator may compute two things of which the graph wants one
        remove_dead(self.emitted)
        return fx.GraphModule(nn.Module(), self.emitted, class_name="FusedProgram")

    def _pass(self, node: fx.Node) -> None:
        made = self.emitted.create_node("placeholder", node.name, name=node.name)
        copy_info(node, made)
        self.values[node] = fx.Proxy(made, self.tracer)
        found = info(node)
        frozen = (found.slot or "").startswith(f"{Output.FROZEN}/")  # another program computed it
        held = found.dtype == "float" and found.shape and node.name not in _WRITTEN
        if held and not found.wide and not frozen:
            self.as_stored.add(node)

    def _call(self, node: fx.Node) -> None:
        last = next(iter(reversed(self.emitted.nodes)))
        args = fx.node.map_arg(node.args, lambda n: self._proxy(n, as_it_is=_takes(node, n)))
        value = self._trace(node, args)
        if self._is_of_weights_alone(node):
            value = value.to(self.dtype)
        elif is_tint(node, *_OF_WEIGHTS) and node.all_input_nodes[0] in self.as_stored:
            self.as_stored.add(node)
        if isinstance(value, fx.Proxy) and value.node.op != "placeholder":
            value.node._rename(node.name)
        self.values[node] = value
        note_origin(self.emitted, last, node)

    def _is_of_weights_alone(self, node: fx.Node) -> bool:
        """Whether what is computed has the type of weights, which is another one, or may have."""
        if is_tint(node, wave):  # of wide frequencies
            return self.dtype in HALF
        if is_tint(node, embedding):
            return self._type(argument(node, "table")) != self.dtype
        return self.dtype in HALF and _is_of_island(node)

    def _trace(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        called = operator_of(node)
        assert called is not None
        run = IN_PLACE[called] if node in self.over else called.implementation
        if called.whole:
            plain = fx.node.map_aggregate(args, lambda x: x.node if isinstance(x, fx.Proxy) else x)
            return fx.Proxy(self.emitted.call_function(run, plain), self.tracer)
        return run(*args)

    def _proxy(self, node: fx.Node, *, as_it_is: bool) -> Any:
        """A value as an operator gets it. as_it_is: of the type that it has."""
        value = self.values[node]
        if not isinstance(value, fx.Proxy):
            return value
        dtype = self._type(node)
        if node in self.as_stored and not as_it_is and self.stored != self.dtype:
            value, dtype = value.to(self.dtype), self.dtype
        return _TypedProxy(value.node, self.tracer, info(node).shape, dtype)

    def _type(self, node: fx.Node) -> torch.dtype:
        kind = info(node).dtype
        if kind != "float":
            return torch.int64 if kind == "int" else torch.bool
        computed = self.stored if node in self.as_stored else self.dtype
        return wide_dtype(computed) if is_wide(node) else computed

    def _returned(self, outputs: Any) -> Any:
        """The nodes of all outputs, of the types that callers hold them in."""
        if self.stored == self.dtype:
            return fx.node.map_arg(outputs, lambda n: self.values[n].node)
        return {kind: self._held(Output(kind), value) for kind, value in outputs.items()}

    def _held(self, kind: Output, value: Any) -> Any:
        if kind is Output.FROZEN:
            return {n: self.values[v].node for n, v in value.items()}
        if not isinstance(value, fx.Node):
            return {n: self._narrowed(v, cached_dtype(n, self.stored)) for n, v in value.items()}
        return self.values[value].node if kind.of_losses else self._narrowed(value, self.stored)

    def _narrowed(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        value = self.values[node]
        kept = is_wide(node) or node in self.as_stored
        found: fx.Node = value.node if kept else value.to(dtype).node
        return found


def _is_of_island(node: fx.Node) -> bool:
    return node.target is operator.getitem and is_tint(
        node.all_input_nodes[0], island_forward, island_backward
    )


def _takes(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator reads this argument in whatever type it has."""
    if is_tint(node, *_CONVERT):
        return source in (argument(node, "weight"), argument(node, "bias"))
    return is_tint(node, *_OF_WEIGHTS, embedding)
