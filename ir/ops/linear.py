"""Linear layers: y_t = W x_t + b.

Shapes: B sequences, T tokens, I inputs, O outputs. A weight is shared, (O, I), before the first
descent and belongs to each sequence, (B, O, I), after it; likewise a bias, (O,) or (B, O).
Source: TINT.md section 2, "Linear"; paper section 2.3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.rates import along
from tintc.ir.ops.shapes import (
    demand,
    demand_activation,
    demand_matrix,
    demand_rate,
    demand_weight,
    each_matrix,
    each_vector,
    said,
)
from tintc.ir.ops.wide import wide_linear
from tintc.ir.precision import HALF, narrow_like, wide


def slot_shape(parameter: Shape) -> tuple[int, ...]:
    """A parameter as slots have it, a vector or a matrix: of further axes all but the last are one,
    and a single number is a vector.
    """
    sizes = tuple(int(size) for size in parameter)
    return (math.prod(sizes[:-1]), sizes[-1]) if len(sizes) > 2 else sizes or (1,)


def as_matrix(parameter: Tensor) -> Tensor:
    """The parameter in that shape, a view of it."""
    if parameter.ndim > 2:
        return parameter.flatten(0, -2)
    return parameter if parameter.ndim else parameter.unsqueeze(0)


def _prefix_shape(parameter: Shape, start: int, stop: int, period: int, transpose: bool) -> Shape:
    demand("B" not in parameter, f"a parameter has shape {said(parameter)}")
    parameter = slot_shape(parameter)
    rows, rest = (parameter[-1], parameter[:-1]) if transpose else (parameter[0], parameter[1:])
    demand(
        0 <= start < stop <= period and not (transpose and not rest),
        f"{start}:{stop} of {period} are no rows of {said(parameter)}",
    )
    assert isinstance(rows, int)
    demand(rows % period == 0, f"{rows} rows are no multiple of {period}")
    return ((stop - start) * (rows // period), *rest)


@operator(
    "(Tensor(a) parameter, int start, int stop, int period, bool transpose) -> Tensor(a)",
    shape=_prefix_shape,
    meaning="value of a prefix slot before any descent",
    kind="read",
)
def prefix(parameter: Tensor, start: int, stop: int, period: int, transpose: bool) -> Tensor:
    """Reads a prefix slot: rows start..stop-1 of every `period` rows of a parameter, after
    transposing it if it is stored as (I, O).

    Consecutive rows have the whole parameter as their period; q, k and v that alternate head by
    head have that of a head. A table of (1, V, D), as some models hold positions, is (V, D); one
    of (H, D, E) is (H D, E).
    """
    parameter = as_matrix(parameter)
    rows = parameter.t() if transpose else parameter
    if (start, stop) == (0, period):
        return rows
    if period == parameter.shape[1 if transpose else 0]:
        return rows[start:stop]
    return torch.unflatten(rows, 0, (-1, period))[:, start:stop].flatten(0, 1)


def _stacked_shape(parts: list[Shape]) -> Shape:
    return (sum(int(part[0]) for part in parts), *parts[0][1:])


@operator(
    "(Tensor[] parts) -> Tensor",
    shape=_stacked_shape,
    meaning="weights of several layers, one below the other",
    kind="optimization",
)
def stack_rows(parts: list[Tensor]) -> Tensor:
    """The weights, or biases, of several layers that read the same activation, one below the
    other.
    """
    return torch.cat(parts)


def _columns_shape(x: Shape, start: int, stop: int) -> Shape:
    return (*x[:-1], stop - start)


@operator(
    "(Tensor(a) x, int start, int stop) -> Tensor(a)",
    shape=_columns_shape,
    meaning="one layer's part of a product of several",
    kind="optimization",
)
def columns(x_BTD: Tensor, start: int, stop: int) -> Tensor:
    """Coordinates start .. stop-1 of a product of several layers."""
    return x_BTD[..., start:stop]


def _linear_shape(x: Shape, weight: Shape, bias: Shape | None = None) -> Shape:
    demand_activation(x)
    demand_matrix(weight)
    demand_weight(weight, x[0], weight[-2], x[-1])
    demand_weight(bias, x[0], weight[-2])
    return (*x[:-1], weight[-2])


@operator(
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    shape=_linear_shape,
    meaning="y = W x + b",
    weights=("weight", "bias"),
)
def linear_forward(x_BTI: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = W x_t + b, (B, T, O)."""
    if weight.dtype != x_BTI.dtype or (bias is not None and bias.dtype != x_BTI.dtype):
        return narrow_like(wide_linear.target(x_BTI, weight, bias, False), x_BTI)
    if weight.ndim == 2 and (bias is None or bias.ndim == 1):
        return F.linear(x_BTI, weight, bias)
    if bias is None:
        return torch.matmul(x_BTI, weight.mT)
    if weight.ndim == 2:
        return torch.matmul(x_BTI, weight.mT) + bias.unsqueeze(-2)
    return torch.baddbmm(bias.unsqueeze(-2), x_BTI, weight.mT)


def _backward_shape(dy: Shape, weight: Shape) -> Shape:
    demand_activation(dy)
    demand_matrix(weight)
    demand_weight(weight, dy[0], dy[-1], weight[-1])
    return (*dy[:-1], weight[-1])


@operator(
    "(Tensor dy, Tensor weight) -> Tensor",
    shape=_backward_shape,
    meaning="dx = W^T dy",
    kind="backward",
)
def linear_backward(dy_BTO: Tensor, weight: Tensor) -> Tensor:
    """dx_t = W^T dy_t, (B, T, I)."""
    if weight.dtype != dy_BTO.dtype:
        return narrow_like(wide_linear.target(dy_BTO, weight, None, True), dy_BTO)
    return torch.matmul(dy_BTO, weight)


def _addend_shape(
    x: Shape, weight: Shape, bias: Shape | None, addend: Shape, transpose: bool
) -> Shape:
    return addend


@operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor addend, bool transpose) -> Tensor",
    shape=_addend_shape,
    meaning="W x + b + addend, or W^T x + addend",
    kind="optimization",
)
def linear_residual(
    x_BTI: Tensor, weight: Tensor, bias: Tensor | None, addend_BTO: Tensor, transpose: bool
) -> Tensor:
    """W x_t + b + addend_t, or W^T x_t + addend_t with transpose: a product and the residual sum
    behind it.
    """
    return (
        linear_backward(x_BTI, weight) if transpose else linear_forward(x_BTI, weight, bias)
    ) + addend_BTO


def _descent_shape(weight: Shape, dy: Shape, x: Shape, rate: Shape) -> Shape:
    for activation in (dy, x):
        demand_activation(activation)
    demand(dy[:-1] == x[:-1], f"dy is {said(dy)} and x {said(x)}; expected the same tokens")
    demand_weight(weight, dy[0], dy[-1], x[-1])
    demand_rate(rate)
    return each_matrix(weight)


def _bias_shape(bias: Shape, dy: Shape, rate: Shape) -> Shape:
    demand_activation(dy)
    demand(len(bias) in (1, 2) and isinstance(bias[-1], int), f"a bias has shape {said(bias)}")
    demand_weight(bias, dy[0], bias[-1])
    demand(int(bias[-1]) > 0, f"a bias has shape {said(bias)}")
    demand(int(dy[-1]) % int(bias[-1]) == 0, f"a bias {said(bias)} does not fit {said(dy)}")
    demand_rate(rate)
    return each_vector(bias)


@operator(
    "(Tensor weight, Tensor dy, Tensor x, Tensor rate) -> Tensor",
    shape=_descent_shape,
    meaning="W - rate sum_t dy x^T",
    kind="descent",
)
def linear_descent(weight: Tensor, dy_BTO: Tensor, x_BTI: Tensor, rate: Tensor) -> Tensor:
    """W <- W - rate * sum_t dy_t x_t^T, one weight a sequence: (B, O, I). A sum over positions, not
    a mean. rate: eta, or what `rates` makes of it.
    """
    if x_BTI.dtype in HALF:
        gradient_BOI: Tensor = wide_linear.target(dy_BTO.mT, x_BTI, None, True)
        return wide(weight) - gradient_BOI * along(rate, x_BTI, 2)
    return torch.baddbmm(weight, (dy_BTO * -along(rate, dy_BTO, 2)).mT, x_BTI)


@operator(
    "(Tensor bias, Tensor dy, Tensor rate) -> Tensor",
    shape=_bias_shape,
    meaning="b - rate sum_t dy",
    kind="descent",
)
def bias_descent(bias: Tensor, dy_BTO: Tensor, rate: Tensor) -> Tensor:
    """b <- b - rate * sum_t dy_t, one bias a sequence: (B, O). Also the descent of a norm's beta,
    summed over pieces that share it.
    """
    size = bias.shape[-1]
    if size != dy_BTO.shape[-1]:
        change = torch.unflatten(wide(dy_BTO), -1, (-1, size)).sum(-2).sum(-2)
    else:
        change = wide(dy_BTO).sum(-2)
    return wide(bias) - along(rate, dy_BTO, 1) * change
