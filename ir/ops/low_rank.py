"""Updates kept as factors: W' = W - eta sum_s dy_s x_s^T is never formed, only applied.

    W' x_t   = W x_t    - eta sum_s dy_s (x_s . x_t)        forward
    W'^T dy_t = W^T dy_t - eta sum_s x_s  (dy_s . dy_t)      backward

Both are linear attention over the training tokens: keys x_s and values dy_s, or the other way
round. Shapes: B sequences, T tokens, S training tokens (of all steps so far, side by side), I
inputs, O outputs.
Source: TINT.md section 2, "Linear"; Irie et al., arXiv 2202.05798.
"""

import torch
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape, side_by_side
from tintc.ir.ops.shapes import demand, said, same_shape
from tintc.ir.ops.wide import wide_linear
from tintc.ir.precision import HALF, narrow_like


@operator(
    "(Tensor y, Tensor x, Tensor keys, Tensor values, Tensor rate, bool with_bias) -> Tensor",
    shape=same_shape,
    meaning="y - rate sum_s values_s (keys_s . x)",
    kind="optimization",
)
def low_rank(
    y_BTO: Tensor,
    x_BTI: Tensor,
    keys_BSI: Tensor,
    values_BSO: Tensor,
    rate: Tensor,
    with_bias: bool,
) -> Tensor:
    """y_t - sum_s rate_s values_s (keys_s . x_t), (B, T, O). with_bias: plus 1 in the brackets,
    which is the descent of the bias. rate: (), (B,) or (B, S). y may be wide: it is rounded after
    the sum.
    """
    if x_BTI.dtype in HALF:
        scores_BTS = wide_linear.target(x_BTI, keys_BSI, None, False)
        return low_rank_of_scores(y_BTO, scores_BTS, values_BSO, rate, with_bias)
    return torch.baddbmm(y_BTO, weights_of(x_BTI, keys_BSI, rate, with_bias), values_BSO)


def _scored_shape(y: Shape, scores: Shape, values: Shape, *_: object) -> Shape:
    fits = (*y[:2], values[1]) == scores and (values[0], values[2]) == (y[0], y[2])
    demand(fits, f"y, scores and values have shapes {said(y)}, {said(scores)} and {said(values)}")
    return y


@operator(
    "(Tensor y, Tensor scores, Tensor values, Tensor rate, bool with_bias) -> Tensor",
    shape=_scored_shape,
    meaning="low_rank by scores that others read too",
    kind="optimization",
)
def low_rank_of_scores(
    y_BTO: Tensor, scores_BTS: Tensor, values_BSO: Tensor, rate: Tensor, with_bias: bool
) -> Tensor:
    """y_t - sum_s rate_s values_s scores_ts, (B, T, O), where scores_ts = keys_s . x_t."""
    weights_BTS = descending(scores_BTS, rate, with_bias)
    if values_BSO.dtype in HALF:
        change_BTO = wide_linear.target(weights_BTS, values_BSO, None, True)
        return narrow_like(y_BTO + change_BTO, values_BSO)
    return torch.baddbmm(y_BTO, weights_BTS, values_BSO)


def weights_of(x_BTI: Tensor, keys_BSI: Tensor, rate: Tensor, with_bias: bool) -> Tensor:
    """-rate_s (keys_s . x_t + [with_bias]), (B, T, S)."""
    return descending(torch.matmul(x_BTI, keys_BSI.mT), rate, with_bias)


def descending(scores_BTS: Tensor, rate: Tensor, with_bias: bool) -> Tensor:
    """-rate_s (scores_ts + [with_bias])."""
    scores_BTS = scores_BTS + 1 if with_bias else scores_BTS
    return scores_BTS * -(rate if rate.ndim == 0 else of_keys(rate, scores_BTS))


def of_keys(rate: Tensor, scores_BTS: Tensor) -> Tensor:
    """A rate of each sequence, (B,), or of each key, (B, S), as it multiplies scores."""
    narrow = rate.to(scores_BTS.dtype).unsqueeze(-1)
    return narrow.unsqueeze(-1) if rate.ndim == 1 else narrow.mT


def _concatenated_shape(parts: list[Shape]) -> Shape:
    first = parts[0]
    demand(
        all((part[0], *part[2:]) == (first[0], *first[2:]) for part in parts),
        f"factors of shapes {', '.join(map(said, parts))} do not stand side by side",
    )
    return (first[0], side_by_side([part[1] for part in parts]), *first[2:])


@operator(
    "(Tensor[] parts) -> Tensor",
    shape=_concatenated_shape,
    meaning="factors of several steps",
    kind="optimization",
)
def concatenate(parts: list[Tensor]) -> Tensor:
    """The factors of several steps side by side: (B, S, D), (B, 2 S, D) -> (B, 3 S, D)."""
    return torch.cat(parts, 1)
