"""Products by oneDNN's kernels instead of the BLAS behind torch.matmul, in float32 on a CPU.

On processors for which that BLAS (MKL) has no kernels of its own, AMD's among them, oneDNN is up to
twice as fast; elsewhere they are about equal. The same sums in another order. These kernels have no
derivative: for calls that nobody differentiates. Shapes as in `linear` and `low_rank`.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.low_rank import low_rank, low_rank_of_scores
from tintc.ir.ops.rates import token_products
from tintc.ir.ops.shapes import each_matrix, same_shape
from tintc.ir.precision import wide

# Up to so many tokens a batched product with factors is faster than oneDNN sequence by sequence: it
# takes as long as reading them, and is one call (0.23 of 0.58 ms for one token of 8 sequences).
FEW = 32
_CONVERTED = 2**20  # numbers of a weight


def available() -> bool:
    """Whether this torch has them (those for x86 and Linux on ARM do)."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product_shape(
    x: Shape, weight: Shape, bias: Shape | None, addend: Shape | None, transpose: bool
) -> Shape:
    return (*x[:-1], weight[-1 if transpose else -2])


@operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, bool transpose) -> Tensor",
    shape=_product_shape,
    meaning="W x + b + addend, or W^T x + addend, by oneDNN",
    kind="optimization",
    whole=True,
)
def onednn_product(
    x_BTI: Tensor, weight: Tensor, bias: Tensor | None, addend_BTO: Tensor | None, transpose: bool
) -> Tensor:
    """W x_t + b + addend_t, (B, T, O), or W^T x_t + addend_t with transpose. The weight is (O, I)
    or (B, O, I), the bias (O,) or (B, O); both may be of half precision.
    """
    matrix, bias = weight.mT if transpose else weight, None if bias is None else wide(bias)
    if matrix.ndim == 3:
        biases = itertools.repeat(bias) if bias is None or bias.ndim == 1 else bias
        addends = itertools.repeat(None) if addend_BTO is None else addend_BTO
        rows = zip(x_BTI, matrix, biases, addends, strict=False)
        return _stacked([_product(*row) for row in rows])
    if bias is not None and bias.ndim == 2:
        return _product(x_BTI, matrix, None, addend_BTO).add_(bias.unsqueeze(-2))
    return _product(x_BTI, matrix, bias, addend_BTO)


@operator(
    "(Tensor y, Tensor x, Tensor keys, Tensor values, Tensor rate, bool with_bias) -> Tensor",
    shape=same_shape,
    meaning="low_rank, by oneDNN",
    kind="optimization",
    whole=True,
)
def onednn_low_rank(
    y_BTO: Tensor,
    x_BTI: Tensor,
    keys_BSI: Tensor,
    values_BSO: Tensor,
    rate: Tensor,
    with_bias: bool,
) -> Tensor:
    """As `low_rank`: y_t - rate sum_s values_s (keys_s . x_t), sequence by sequence."""
    if x_BTI.shape[1] <= FEW:
        return low_rank(y_BTO, x_BTI, keys_BSI, values_BSO, rate, with_bias)
    every = zip(y_BTO, x_BTI, keys_BSI, values_BSO, _of_each(rate, x_BTI), strict=True)
    parts = [
        _product(_scaled(_product(x, keys, None, None), by, with_bias), values.mT, None, y)
        for y, x, keys, values, by in every
    ]
    return _stacked(parts)


@operator(
    "(Tensor x, Tensor y) -> Tensor",
    shape=lambda x, y: (x[0], x[1], y[1]),
    meaning="token_products, by oneDNN",
    kind="optimization",
    wide=True,
    whole=True,
)
def onednn_token_products(x_BSD: Tensor, y_BRD: Tensor) -> Tensor:
    """As `token_products`: x_s . y_r, (B, S, R)."""
    if x_BSD.shape[1] <= FEW:
        return token_products(x_BSD, y_BRD)
    parts = [_product(x, y, None, None) for x, y in zip(x_BSD, y_BRD, strict=True)]
    return _stacked(parts)


@operator(
    "(Tensor y, Tensor scores, Tensor values, Tensor rate, bool with_bias) -> Tensor",
    shape=same_shape,
    meaning="low_rank_of_scores, by oneDNN",
    kind="optimization",
    whole=True,
)
def onednn_low_rank_of_scores(
    y_BTO: Tensor, scores_BTS: Tensor, values_BSO: Tensor, rate: Tensor, with_bias: bool
) -> Tensor:
    """As `low_rank_of_scores`: y_t - sum_s rate_s values_s scores_ts."""
    if y_BTO.shape[1] <= FEW:
        return low_rank_of_scores(y_BTO, scores_BTS, values_BSO, rate, with_bias)
    every = zip(y_BTO, scores_BTS, values_BSO, _of_each(rate, y_BTO), strict=True)
    parts = [
        _product((scores + 1 if with_bias else scores) * -by, values.mT, None, y)
        for y, scores, values, by in every
    ]
    return _stacked(parts)


@operator(
    "(Tensor weight, Tensor dy, Tensor x, Tensor rate) -> Tensor",
    shape=each_matrix,
    meaning="linear_descent, by oneDNN",
    kind="optimization",
    whole=True,
    wide=True,
)
def onednn_descent(weight: Tensor, dy_BTO: Tensor, x_BTI: Tensor, rate: Tensor) -> Tensor:
    """As `linear_descent`: W - rate sum_t dy_t x_t^T, (B, O, I)."""
    rows = rows_of_descent(weight, dy_BTO, x_BTI, rate)
    first = next(rows)
    if len(x_BTI) == 1:
        return first.unsqueeze(0)
    found = first.new_empty(len(x_BTI), *first.shape)  # a list of all would be a second copy
    found[0] = first
    for own, new in zip(found[1:], rows, strict=True):
        own.copy_(new)
    return found


def rows_of_descent(
    weight: Tensor, dy_BTO: Tensor, x_BTI: Tensor, rate: Tensor
) -> Iterator[Tensor]:
    """The new weight of each sequence, (O, I), one after the other."""
    before = weight.expand(len(x_BTI), *weight.shape[-2:])
    for w, dy, x, by in zip(before, dy_BTO, x_BTI, _of_each(rate, x_BTI), strict=True):
        yield _product((dy * -by).mT, x.mT, None, w)


def _of_each(rate: Tensor, x_BTD: Tensor) -> Iterable[Tensor]:
    """The rate of each sequence: one number, or (S,) of its keys."""
    return rate.to(x_BTD.dtype) if rate.ndim else itertools.repeat(rate, len(x_BTD))


def _scaled(scores: Tensor, rate: Tensor, with_bias: bool) -> Tensor:
    return (scores.add_(1) if with_bias else scores).mul_(-rate)


def _stacked(parts: list[Tensor]) -> Tensor:
    """One below the other; a single one is not copied."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    if matrix.dtype != x.dtype:
        return _of_stored(x, matrix, bias, addend)
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.tint_kernels.product(x, matrix, bias, addend)
        return y
    return _kernel(x, matrix, bias, addend)


def _kernel(x: Tensor, matrix: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    if addend is None:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    else:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, addend, matrix, bias, "add")
    return y


# torch.compile has lowerings of oneDNN's operators for constant weights alone; what it cannot look
# into it calls as it is. Without it, a call through the dispatcher would cost each product more.
_KERNELS: Any = torch.library.Library("tint_kernels", "DEF")  # type: ignore[no-untyped-call]
_KERNELS.define("product(Tensor x, Tensor matrix, Tensor? bias, Tensor? addend) -> Tensor")
_KERNELS.impl("product", _kernel, "CPU")


def _fake_product(x: Tensor, matrix: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], matrix.shape[0]))


torch.library.register_fake("tint_kernels::product", _fake_product, lib=_KERNELS)


def _of_stored(x: Tensor, matrix: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    """The product with a half-precision weight, converted a part at a time: a part stays in the
    processor's cache, where the whole would go to memory and back for every token that is decoded.
    """
    y = x.new_empty(*x.shape[:-1], len(matrix))
    rows = max(1, _CONVERTED // matrix.shape[-1])
    for start in range(0, len(matrix), rows):
        part = slice(start, start + rows)
        own = None if bias is None else bias[part]
        y[..., part] = _product(x, wide(matrix[part]), own, None)
    return y if addend is None else y.add_(addend)
