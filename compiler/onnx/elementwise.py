"""Arithmetic, comparisons and activations of the export, number by number. See `operators.py`.

Types are promoted as torch promotes them; float16 is multiplied by the learning rate in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from numpy.polynomial.chebyshev import chebinterpolate

from tintc.compiler.onnx.graph import TYPES, Graph, Value
from tintc.compiler.onnx.shapes import (
    broadcast,
    operator,
    value_of,
)

_HALF = torch.float16


def cast(graph: Graph, x: Value, dtype: torch.dtype) -> Value:
    """x in another type."""
    if x.dtype == dtype:
        return x
    if x.known is not None:
        return graph.constant(x.known.to(dtype))
    if dtype not in TYPES:
        raise graph.refuse(f"numbers of type {dtype}")
    return graph.add("Cast", [x], x.dims, dtype, to=TYPES[dtype])


def _promoted(graph: Graph, *operands: Any) -> list[Value]:
    """Operands as values of the type that torch computes in."""
    plain = [
        torch.empty((1,) * x.ndim, dtype=x.dtype) if isinstance(x, Value) else x for x in operands
    ]
    dtype = torch.result_type(*plain)
    return [
        cast(
            graph,
            value_of(graph, x)
            if isinstance(x, (Value, torch.Tensor))
            else value_of(graph, x, dtype),
            dtype,
        )
        for x in operands
    ]


def _binary(graph: Graph, kind: str, x: Any, y: Any, dtype: torch.dtype | None = None) -> Value:
    a, b = _promoted(graph, x, y)
    return graph.add(kind, [a, b], broadcast(a.dims, b.dims), dtype or a.dtype)


def _all(x: Any, number: float) -> bool:
    """Whether an operand is known to be this number everywhere."""
    known = x.known if isinstance(x, Value) else torch.as_tensor(x)
    return known is not None and bool((known == number).all())


def _like_torch(x: Value, other: Any) -> Value | None:
    """x, if an operation with `other` changes neither its type nor its dimensions."""
    dims = other.dims if isinstance(other, Value) else tuple(torch.as_tensor(other).shape)
    return x if isinstance(x, Value) and broadcast(x.dims, dims) == x.dims else None


@operator("add", "__add__", "__radd__")
def add(graph: Graph, x: Any, y: Any) -> Value:
    for one, other in ((x, y), (y, x)):
        if (
            isinstance(one, Value)
            and _all(other, 0)
            and (same := _like_torch(one, other)) is not None
        ):
            return same
    return _binary(graph, "Add", x, y)


@operator("sub", "__sub__")
def sub(graph: Graph, x: Any, y: Any) -> Value:
    return _binary(graph, "Sub", x, y)


@operator("rsub", "__rsub__")
def rsub(graph: Graph, x: Any, y: Any) -> Value:
    return _binary(graph, "Sub", y, x)


@operator("mul", "__mul__", "__rmul__")
def mul(graph: Graph, x: Any, y: Any) -> Value:
    for one, other in ((x, y), (y, x)):
        if (
            isinstance(one, Value)
            and _all(other, 1)
            and (same := _like_torch(one, other)) is not None
        ):
            return same
    halves = [v.dtype == _HALF for v in (x, y) if isinstance(v, Value)]
    if any(halves) and not all(halves):  # a rate of 1e-5 has no digits left in float16
        a, b = (cast(graph, v, torch.float32) if isinstance(v, Value) else v for v in (x, y))
        return cast(graph, _binary(graph, "Mul", a, b), _HALF)
    return _binary(graph, "Mul", x, y)


@operator("pow", "__pow__")
def power(graph: Graph, x: Any, y: Any) -> Value:
    halves = [v.dtype == _HALF for v in (x, y) if isinstance(v, Value)]
    if any(halves):  # 0.999 has no digits left in float16
        a, b = (cast(graph, v, torch.float32) if isinstance(v, Value) else v for v in (x, y))
        return cast(graph, _binary(graph, "Pow", a, b), _HALF)
    return _binary(graph, "Pow", x, y)


@operator("div", "__truediv__", "true_divide")
def div(graph: Graph, x: Any, y: Any) -> Value:
    return _binary(graph, "Div", x, y)


@operator("addcmul")
def addcmul(graph: Graph, x: Value, a: Any, b: Any) -> Value:
    return x if _all(a, 0) else add(graph, x, mul(graph, a, b))


@operator("neg", "__neg__")
def neg(graph: Graph, x: Value) -> Value:
    return graph.add("Neg", [x], x.dims, x.dtype)


@operator("maximum")
def maximum(graph: Graph, x: Any, y: Any) -> Value:
    return _binary(graph, "Max", x, y)


@operator("clamp")
def clamp(graph: Graph, x: Value, min: float | None = None, max: float | None = None) -> Value:
    x = x if min is None else _binary(graph, "Max", x, min)
    return x if max is None else _binary(graph, "Min", x, max)


@operator("square")
def square(graph: Graph, x: Value) -> Value:
    return mul(graph, x, x)


@operator("eq", "__eq__")
def eq(graph: Graph, x: Any, y: Any) -> Value:
    return _binary(graph, "Equal", x, y, torch.bool)


@operator("ne", "__ne__")
def ne(graph: Graph, x: Any, y: Any) -> Value:
    return logical_not(graph, eq(graph, x, y))


@operator("gt", "__gt__")
def gt(graph: Graph, x: Any, y: Any) -> Value:
    return _binary(graph, "Greater", x, y, torch.bool)


@operator("ge", "__ge__")
def ge(graph: Graph, x: Any, y: Any) -> Value:
    return _binary(graph, "GreaterOrEqual", x, y, torch.bool)


@operator("__and__", "logical_and")
def logical_and(graph: Graph, x: Value, y: Value) -> Value:
    return _binary(graph, "And", x, y)


@operator("__or__", "logical_or")
def logical_or(graph: Graph, x: Value, y: Value) -> Value:
    return _binary(graph, "Or", x, y)


@operator("__invert__", "logical_not")
def logical_not(graph: Graph, x: Value) -> Value:
    return graph.add("Not", [x], x.dims, torch.bool)


@operator("where")
def where(graph: Graph, condition: Any, x: Any, y: Any) -> Value:
    for number, chosen in ((1, x), (0, y)):
        if _all(condition, number):
            return value_of(graph, chosen)
    a, b = _promoted(graph, x, y)
    chosen_by = value_of(graph, condition)
    return graph.add("Where", [chosen_by, a, b], broadcast(chosen_by.dims, a.dims, b.dims), a.dtype)


@operator("masked_fill")
def masked_fill(graph: Graph, x: Value, mask: Value, number: float) -> Value:
    return where(graph, mask, graph.constant(number, x.dtype), x)


@operator("to")
def to(graph: Graph, x: Value, dtype: torch.dtype) -> Value:
    return cast(graph, x, dtype)


@operator("float")
def to_float(graph: Graph, x: Value) -> Value:
    return cast(graph, x, torch.float32)


@operator("double")
def to_double(graph: Graph, x: Value) -> Value:
    return cast(graph, x, torch.float64)


def _unary(kind: str) -> Callable[..., Value]:
    def apply(graph: Graph, x: Value, **_: Any) -> Value:
        return graph.add(kind, [x], x.dims, x.dtype)

    return apply


for _torch, _onnx in {
    "relu": "Relu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "exp": "Exp",
    "sqrt": "Sqrt",
    "cos": "Cos",
    "sin": "Sin",
}.items():
    operator(_torch)(_unary(_onnx))


@operator("erf")
def erf(graph: Graph, x: Value) -> Value:
    """Of float64, which runtimes have no kernel for: sign(x) (1 - t exp(p(t) - x^2)) with t = 2 /
    (2 + |x|), whose p is a Chebyshev series to the last bits. Source: Press et al., Numerical
    Recipes, section 6.2.2."""
    if x.dtype != torch.float64:
        return graph.add("Erf", [x], x.dims, x.dtype)
    size = graph.add("Abs", [x], x.dims, x.dtype)
    t = div(graph, 2.0, add(graph, size, 2.0))
    s = sub(graph, mul(graph, t, 2.0), 1.0)
    behind, ahead = graph.constant(0.0, x.dtype), graph.constant(0.0, x.dtype)
    first, *rest = _erf_series()
    for coefficient in reversed(rest):  # Clenshaw's recurrence
        ahead, behind = (
            add(graph, sub(graph, mul(graph, mul(graph, s, 2.0), ahead), behind), coefficient),
            ahead,
        )
    series = add(graph, sub(graph, mul(graph, s, ahead), behind), first)
    power = sub(graph, series, square(graph, x))
    rest_of_one = mul(graph, t, graph.add("Exp", [power], x.dims, x.dtype))
    return mul(graph, graph.add("Sign", [x], x.dims, x.dtype), rsub(graph, rest_of_one, 1.0))


@cache
def _erf_series() -> list[float]:
    """Chebyshev coefficients of log(erfc(z) exp(z^2) / t) over 2 t - 1, z = 2 / t - 2."""

    def logarithm(s: Any) -> Any:
        t = (torch.from_numpy(s) + 1) / 2
        return torch.log(torch.special.erfcx(2 / t - 2) / t).numpy()

    return [float(c) for c in chebinterpolate(logarithm, 32)]


@operator("rsqrt")
def rsqrt(graph: Graph, x: Value) -> Value:
    return graph.add("Reciprocal", [graph.add("Sqrt", [x], x.dims, x.dtype)], x.dims, x.dtype)


@operator("silu")
def silu(graph: Graph, x: Value, inplace: bool = False) -> Value:
    return mul(graph, x, graph.add("Sigmoid", [x], x.dims, x.dtype))


@operator("gelu")
def gelu(graph: Graph, x: Value, approximate: str = "none") -> Value:
    if graph.opset >= 20 and x.dtype != torch.float64:  # runtimes have no kernel of it for float64
        return graph.add("Gelu", [x], x.dims, x.dtype, approximate=approximate)
    if approximate == "tanh":
        inner = mul(
            graph,
            add(graph, x, mul(graph, mul(graph, square(graph, x), x), 0.044715)),
            math.sqrt(2 / math.pi),
        )
        grown = graph.add("Tanh", [inner], x.dims, x.dtype)
    else:
        grown = erf(graph, mul(graph, x, math.sqrt(0.5)))
    return mul(graph, mul(graph, x, 0.5), add(graph, grown, 1.0))
