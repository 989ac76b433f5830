"""Products that are summed and kept in float32, of half-precision numbers.

An update is often smaller than the last digit of what it is added to, of a weight as of a product.
So W'x and W x - eta sum_s dy_s (x_s . x) are rounded once, when all of it is summed.

Shapes: x (B, N, K) or (N, K), a weight (M, K) or (B, M, K).
"""

import torch
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.shapes import demand, demand_activation, demand_matrix, demand_weight, said
from tintc.ir.precision import HALF, wide

_REST = 2.0**8  # what rounding leaves is at most a part of so many


def _linear_shape(x: Shape, weight: Shape, bias: Shape | None, transpose: bool) -> Shape:
    demand_activation(x)
    demand_matrix(weight)
    rows, columns = weight[-2:] if transpose else (weight[-1], weight[-2])
    fits = x[-1] == rows and weight[:-2] in ((), x[:1])
    demand(fits, f"x and a weight have shapes {said(x)} and {said(weight)}")
    demand_weight(bias, x[0], columns)
    return (*x[:-1], columns)


@operator(
    "(Tensor x, Tensor weight, Tensor? bias, bool transpose) -> Tensor",
    shape=_linear_shape,
    meaning="W x + b, or W^T x + b, in float32 of half precision",
    kind="optimization",
    whole=True,
    wide=True,
)
def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transpose: bool) -> Tensor:
    """W x_t + b, or W^T x_t + b with transpose, in at least float32. Each factor may be of half
    precision or wide; the bias is (M,) or (B, M).
    """
    matrix = weight if transpose else weight.mT
    half = next((factor.dtype for factor in (x, matrix) if factor.dtype in HALF), None)
    if x.device.type != "cuda" or half is None or torch.is_grad_enabled():
        y = torch.matmul(wide(x), wide(matrix))
    else:
        y = by_halves(x, matrix, half)
    if bias is None:
        return y
    return y + (wide(bias) if bias.ndim == 1 else wide(bias).unsqueeze(-2))


def by_halves(x: Tensor, y: Tensor, half: torch.dtype) -> Tensor:
    """x y, from products of half-precision factors alone, which a GPU computes ten times as fast as
    those of float32: a wide factor is what rounds to half precision, and what that leaves, which
    has as many digits again. No derivative.
    """
    found: Tensor | None = None
    for a, of_a in _parts(x, half):
        for b, of_b in _parts(y, half):
            part = _summed_wide(a, b) * (of_a * of_b)
            found = part if found is None else found.add_(part)
    assert found is not None
    return found


def _parts(factor: Tensor, half: torch.dtype) -> list[tuple[Tensor, Tensor | float]]:
    """Half-precision tensors, and by what each is multiplied. float16 ends at 6e-5 and 65504:
    numbers are brought to 1 by a power of two.
    """
    if factor.dtype in HALF:
        return [(factor, 1.0)]
    largest = factor.abs().amax().clamp(min=torch.finfo(factor.dtype).tiny)
    unit = torch.exp2(torch.floor(torch.log2(largest)))
    scaled = factor / unit
    first = scaled.to(half)
    rest = ((scaled - first) * _REST).to(half)
    return [(first, unit), (rest, unit / _REST)]


def _summed_wide(x: Tensor, y: Tensor) -> Tensor:
    """The product of two half-precision factors in float32."""
    if x.ndim == y.ndim == 2:
        return torch.mm(x, y, out_dtype=torch.float32)
    if y.ndim == 2:
        rows = torch.mm(x.flatten(0, 1), y, out_dtype=torch.float32)
        return rows.view(*x.shape[:2], y.shape[-1])
    return torch.bmm(x.expand(len(y), *x.shape[-2:]), y, out_dtype=torch.float32)
