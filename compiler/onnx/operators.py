"""What torch functions are in ONNX: the standard operators that one opset has, and nothing of any
runtime's own.

Each takes the graph and the arguments that torch got. Numbers follow torch; softmax of float16 is
computed in float32. Here are sums, norms, products, attention and losses; `elementwise.py` and
`shapes.py` hold the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tintc.compiler.onnx.elementwise import add, cast, eq, mul, neg, rsqrt, square, where
from tintc.compiler.onnx.graph import Dim, Graph, Value
from tintc.compiler.onnx.shapes import (
    FUNCTIONS,
    broadcast,
    operator,
    product,
    reshape,
    transpose,
    unsqueeze,
    value_of,
)

_HALF = torch.float16


def _reduced(graph: Graph, kind: str, x: Value, dim: int, keepdim: bool) -> Value:
    at = dim % x.ndim
    dims = (*x.dims[:at], *((1,) if keepdim else ()), *x.dims[at + 1 :])
    return graph.add(kind, [x, graph.ints(at)], dims, x.dtype, keepdims=int(keepdim))


@operator("sum")
def sum_(
    graph: Graph, x: Value, dim: int | tuple[int, ...] | None = None, keepdim: bool = False
) -> Value:
    """Over one dimension, several, or all."""
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    for at in sorted((each % x.ndim for each in dims), reverse=True):
        x = _reduced(graph, "ReduceSum", x, at, keepdim)
    return x


@operator("mean")
def mean(graph: Graph, x: Value, dim: int, keepdim: bool = False) -> Value:
    return _reduced(graph, "ReduceMean", x, dim, keepdim)


@operator("any")
def any_(graph: Graph, x: Value, dim: int, keepdim: bool = False) -> Value:
    return cast(
        graph, _reduced(graph, "ReduceMax", cast(graph, x, torch.int32), dim, keepdim), torch.bool
    )


@operator("amax")
def amax(graph: Graph, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    """The largest number along one dimension, or of all."""
    if dim is not None:
        return _reduced(graph, "ReduceMax", x, dim, keepdim)
    return graph.add("ReduceMax", [x, graph.ints(*range(x.ndim))], (), x.dtype, keepdims=0)


@operator("cumsum")
def cumsum(graph: Graph, x: Value, dim: int) -> Value:
    return graph.add("CumSum", [x, graph.constant(dim % x.ndim)], x.dims, x.dtype)


@operator("softmax")
def softmax(graph: Graph, x: Value, dim: int) -> Value:
    return graph.add("Softmax", [x], x.dims, x.dtype, axis=dim % x.ndim)


@operator("layer_norm")
def layer_norm(
    graph: Graph,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Value:
    gain = (
        graph.constant(torch.ones(tuple(normalized_shape)), x.dtype)
        if weight is None
        else value_of(graph, weight)
    )
    inputs = [x, gain, *([] if bias is None else [value_of(graph, bias)])]
    return graph.add(
        "LayerNormalization", inputs, x.dims, x.dtype, axis=-len(normalized_shape), epsilon=eps
    )


@operator("rms_norm")
def rms_norm(
    graph: Graph, x: Value, normalized_shape: Sequence[int], weight: None = None, eps: float = 0.0
) -> Value:
    u = cast(graph, x, torch.float32) if x.dtype == _HALF else x
    scale = rsqrt(graph, add(graph, mean(graph, square(graph, u), -1, keepdim=True), eps))
    return cast(graph, mul(graph, u, scale), x.dtype)


@operator("matmul", "__matmul__")
def matmul(graph: Graph, x: Any, y: Any) -> Value:
    a, b = value_of(graph, x), value_of(graph, y)
    if b.ndim == 2 and a.ndim > 2 and b.known is None:
        return _gemm(graph, a, b, None, 0)
    dims = (*broadcast(a.dims[:-2], b.dims[:-2]), a.dims[-2], b.dims[-1])
    return graph.add("MatMul", [a, b], dims, a.dtype)


@operator("linear")
def linear(graph: Graph, x: Value, weight: Any, bias: Any = None) -> Value:
    return _gemm(
        graph, x, value_of(graph, weight), None if bias is None else value_of(graph, bias), 1
    )


@operator("wide_linear.default")
def wide_linear(graph: Graph, x: Value, weight: Any, bias: Any, transpose_it: bool) -> Value:
    """Of the dialect (`ir/ops/wide.py`): in float32 where factors are float16."""
    a, matrix = (_wide(graph, value_of(graph, factor)) for factor in (x, weight))
    if matrix.ndim == 2:
        y = _gemm(graph, a, matrix, None, 0 if transpose_it else 1)
    else:
        y = matmul(graph, a, matrix if transpose_it else transpose(graph, matrix, -1, -2))
    if bias is None:
        return y
    b = _wide(graph, value_of(graph, bias))
    return add(graph, y, b if b.ndim == 1 else unsqueeze(graph, b, -2))


def _wide(graph: Graph, x: Value) -> Value:
    return cast(graph, x, torch.float32) if x.dtype == _HALF else x


def _gemm(graph: Graph, x: Value, weight: Value, bias: Value | None, transposed: int) -> Value:
    """A product with a weight that all sequences share, over all their tokens at once: runtimes
    pack such weights once.
    """
    rows, (size, other) = product(x.dims[:-1]), weight.dims if transposed else weight.dims[::-1]
    flat = graph.add("Reshape", [x, graph.ints(-1, int(other))], (rows, other), x.dtype)
    y = graph.add(
        "Gemm",
        [flat, weight, *([] if bias is None else [bias])],
        (rows, size),
        x.dtype,
        transB=transposed,
    )
    return reshape(graph, y, (*x.dims[:-1], size))


@operator("baddbmm")
def baddbmm(graph: Graph, addend: Value, x: Value, y: Value) -> Value:
    return add(graph, addend, matmul(graph, x, y))


@operator("scaled_dot_product_attention")
def attention(
    graph: Graph,
    q: Value,
    k: Value,
    v: Value,
    *,
    attn_mask: Any,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Value:
    batch, heads, tokens, width = q.dims
    groups = k.dims[1] if enable_gqa else heads
    assert isinstance(heads, int) and isinstance(groups, int)
    # Queries of a group stand below each other, so that nothing copies their keys and values.
    times = heads // groups
    rows: Dim = times * tokens if isinstance(tokens, int) else f"{times}*{tokens}"
    rows = tokens if times == 1 else rows
    q = reshape(graph, mul(graph, q, scale), (batch, groups, rows, width))
    scores = matmul(graph, q, transpose(graph, k, -1, -2))
    scores = reshape(graph, scores, (batch, heads, tokens, k.dims[2]))
    if scores.dtype == _HALF:
        scores = cast(graph, scores, torch.float32)
    if attn_mask.dtype == torch.bool:
        scores = where(graph, attn_mask, scores, graph.constant(float("-inf"), scores.dtype))
    else:
        scores = add(graph, scores, cast(graph, attn_mask, scores.dtype))
    seen = cast(graph, softmax(graph, scores, -1), v.dtype)
    seen = reshape(graph, seen, (batch, groups, rows, k.dims[2]))
    return reshape(graph, matmul(graph, seen, v), (batch, heads, tokens, v.dims[-1]))


@operator("cross_entropy")
def cross_entropy(graph: Graph, z: Value, labels: Value, *, ignore_index: int, **_: Any) -> Value:
    """-log p(label) of every row, 0 where the label is ignored."""
    log = graph.add("LogSoftmax", [z], z.dims, z.dtype, axis=-1)
    ignored = eq(graph, labels, ignore_index)
    at = unsqueeze(graph, where(graph, ignored, graph.constant(0, torch.int64), labels), -1)
    found = graph.add("GatherElements", [log, at], (z.dims[0], 1), z.dtype, axis=1)
    losses = neg(graph, reshape(graph, found, labels.dims))
    return where(graph, ignored, graph.constant(0, z.dtype), losses)


# By the names of torch's functions and methods. Complete here, where all three files are imported.
OPERATORS: dict[str, Callable[..., Any]] = FUNCTIONS
