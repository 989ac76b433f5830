"""Writes islands as ONNX: torch.onnx exports each program, and its nodes join the graph."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx.inliner
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tintc.compiler.onnx.graph import BATCH, Dim, Graph, Value
from tintc.ir.errors import UnsupportedModelError, raise_if_interrupted
from tintc.ir.island import read
from tintc.ir.ops.island import island_backward, island_forward

_TRACED, _OTHER = (3, 11), (2, 5)  # sequences and tokens


class _Called(nn.Module):
    """An island's operator with the arguments that are no tensors."""

    def __init__(self, call: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        super().__init__()
        self.call = call

    def forward(self, values: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.call(values))


def write_forward(inputs: list[Value], mask: Value | None, program: str) -> list[Value]:
    """The island's results."""
    count = len(inputs)
    given = [*inputs, *([] if mask is None else [mask])]

    def call(values: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = island_forward(
            list(values[:count]), None if mask is None else values[count], program
        )
        return found

    tokens = next(
        x.dims[:2]
        for x, port in zip(inputs, read(program).inputs, strict=True)
        if port.kind in ("tokens", "ids")
    )
    dims = [(*tokens, width) for width in read(program).widths]
    return _written((program, mask is None), call, given, dims)


def write_backward(
    gradients: list[Value | None],
    inputs: list[Value],
    mask: Value | None,
    program: str,
    wanted: list[int],
) -> list[Value]:
    """The gradients of the wanted inputs."""
    known = [dy for dy in gradients if dy is not None]
    given = [*known, *inputs, *([] if mask is None else [mask])]

    def call(values: Sequence[Tensor]) -> list[Tensor]:
        rest = list(values)
        dys = [None if dy is None else rest.pop(0) for dy in gradients]
        own = [rest.pop(0) for _ in inputs]
        found: list[Tensor] = island_backward(dys, own, rest[0] if rest else None, program, wanted)
        return found

    ports = read(program).inputs
    dims: list[tuple[Dim, ...]] = [
        inputs[i].dims if ports[i].kind == "tokens" else (BATCH, *ports[i].shape) for i in wanted
    ]
    known_ones = tuple(dy is not None for dy in gradients)
    return _written((program, mask is None, known_ones, tuple(wanted)), call, given, dims)


def _written(
    key: tuple[Any, ...],
    call: Callable[[Sequence[Tensor]], list[Tensor]],
    given: list[Value],
    dims: Sequence[tuple[Dim, ...]],
) -> list[Value]:
    """key: with the kinds of the given values, what is computed; it is exported once."""
    graph = given[0].graph
    key = (*key, *((value.dims, value.dtype) for value in given))
    if key not in graph.islands:
        graph.islands[key] = _model(graph, _Called(call).eval(), given)
    return _joined(graph, graph.islands[key], given, dims)


def _model(graph: Graph, module: nn.Module, given: list[Value]) -> onnx.ModelProto:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            exported = _exported(module, given)
            proto = torch.onnx.export(
                exported, opset_version=graph.opset, dynamo=True, verbose=False
            ).model_proto  # type: ignore[union-attr]
    except Exception as error:  # whatever torch.onnx raises
        raise_if_interrupted(error)
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"an island has no form in ONNX ({said}); nothing was exported"
        ) from error
    return onnx.inliner.inline_local_functions(proto)


def _exported(module: nn.Module, given: list[Value]) -> torch.export.ExportedProgram:
    """With every named dimension dynamic. Raises ValueError for one that was traced as a number."""
    names = {dim for value in given for dim in value.dims if isinstance(dim, str)}
    dynamic = {name: torch.export.Dim(f"d_{i}") for i, name in enumerate(sorted(names))}
    shapes = [
        {axis: dynamic[dim] for axis, dim in enumerate(value.dims) if isinstance(dim, str)}
        for value in given
    ]
    sample, other = (_sample(given, sizes) for sizes in (_TRACED, _OTHER))
    exported = torch.export.export(
        module, (sample,), dynamic_shapes={"values": shapes}, strict=False
    )
    for found, expected in zip(exported.module()(other), module(other), strict=True):
        if found.shape != expected.shape or not torch.allclose(found, expected, equal_nan=True):
            raise ValueError("its traced form stands for one length only")
    return exported


def _sample(given: list[Value], sizes: tuple[int, int]) -> list[Tensor]:
    def size(dim: Dim) -> int:
        return dim if isinstance(dim, int) else sizes[0] if dim == BATCH else sizes[1]

    found = []
    for value in given:
        shape = [size(dim) for dim in value.dims]
        if value.dtype == torch.bool:
            found.append(torch.ones(shape, dtype=torch.bool).tril())
        elif value.dtype.is_floating_point:
            found.append(
                torch.linspace(0.1, 0.9, max(1, _count(shape))).view(shape).to(value.dtype)
            )
        else:
            found.append(torch.zeros(shape, dtype=value.dtype))
    return found


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def _joined(
    graph: Graph, proto: onnx.ModelProto, given: list[Value], dims: Sequence[tuple[Dim, ...]]
) -> list[Value]:
    """The exported nodes under names of the graph; their inputs are the given values."""
    names = {
        described.name: graph.name_of(value)
        for described, value in zip(proto.graph.input, given, strict=True)
    }
    for tensor in proto.graph.initializer:
        array = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        number = torch.empty(array.shape, dtype=array.dtype).copy_(array)  # of the usual strides
        names[tensor.name] = graph.name_of(graph.constant(number))
    graph.join(proto.graph.node, names)
    return [
        Value(graph, names[output.name], shape, given[0].dtype)
        for output, shape in zip(proto.graph.output, dims, strict=True)
    ]
