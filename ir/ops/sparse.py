"""Reads of a table whose descent is never formed: E' = E - rate sum_s e(i_s) dy_s^T.

e(i) is the one-hot of row i: the descent of an embedding changes the rows of its training tokens
alone. What reads E' reads E, and each training token s adds its part:

    E'[i_t]    = E[i_t]    - rate sum_s [i_s = i_t] dy_s       embedding, `same_rows`
    E' x_t     = E x_t     - rate sum_s e(i_s) (dy_s . x_t)    head, `scattered_scores`
    E'^T dz_t  = E^T dz_t  - rate sum_s dy_s dz_t[i_s]         back through it, `gathered_scores`

and where E' is a head too, E' = E - rate sum_s dz_s h_s^T, its rows are

    E'[i_t]    = E[i_t]    - rate sum_s dz_s[i_t] h_s          embedding, `rows_of_factors`

Shapes: B sequences, T tokens, S training tokens, V rows, D width. A rate is one number, or one a
sequence. Offsets are added to the indices that stand before them.
Source: TINT.md section 7, `train`.
"""

import torch
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.ops.shapes import same_shape


@operator(
    "(Tensor y, Tensor index, int offset, Tensor keys, int key_offset, Tensor dy, Tensor rate) -> "
    "Tensor",
    shape=same_shape,
    meaning="y - rate sum_s dy_s where both tokens read one row",
    kind="optimization",
    takes={"index": "int", "keys": "int"},
)
def same_rows(
    y_BTD: Tensor,
    index_BT: Tensor,
    offset: int,
    keys_BS: Tensor,
    key_offset: int,
    dy_BSD: Tensor,
    rate: Tensor,
) -> Tensor:
    """y_t - rate sum_s [i_s = i_t] dy_s, (B, T, D)."""
    rows_BT = index_BT + (offset - key_offset)
    same_BTS = (rows_BT.unsqueeze(-1) == keys_BS.unsqueeze(-2)).to(y_BTD.dtype)
    return torch.baddbmm(y_BTD, _descending(same_BTS, rate), dy_BSD)


@operator(
    "(Tensor y, Tensor index, int offset, Tensor dz, Tensor h, Tensor rate) -> Tensor",
    shape=same_shape,
    meaning="y - rate sum_s h_s dz_s[index]",
    kind="optimization",
    takes={"index": "int"},
)
def rows_of_factors(
    y_BTD: Tensor, index_BT: Tensor, offset: int, dz_BSV: Tensor, h_BSD: Tensor, rate: Tensor
) -> Tensor:
    """y_t - rate sum_s h_s dz_s[i_t], (B, T, D)."""
    scores_BST = torch.gather(dz_BSV, -1, _for_each(index_BT, offset, h_BSD))
    return torch.baddbmm(y_BTD, _descending(scores_BST.mT, rate), h_BSD)


@operator(
    "(Tensor z, Tensor x, Tensor keys, int offset, Tensor dy, Tensor rate) -> Tensor",
    shape=same_shape,
    meaning="z - rate sum_s (dy_s . x) at row i_s",
    kind="optimization",
    takes={"keys": "int"},
)
def scattered_scores(
    z_BTV: Tensor, x_BTD: Tensor, keys_BS: Tensor, offset: int, dy_BSD: Tensor, rate: Tensor
) -> Tensor:
    """z_t - rate sum_s e(i_s) (dy_s . x_t), (B, T, V)."""
    scores_BTS = _descending(torch.matmul(x_BTD, dy_BSD.mT), rate)
    return z_BTV.scatter_add(-1, _for_each(keys_BS, offset, x_BTD), scores_BTS)


@operator(
    "(Tensor dx, Tensor dz, Tensor keys, int offset, Tensor dy, Tensor rate) -> Tensor",
    shape=same_shape,
    meaning="dx - rate sum_s dy_s dz[i_s]",
    kind="optimization",
    takes={"keys": "int"},
)
def gathered_scores(
    dx_BTD: Tensor, dz_BTV: Tensor, keys_BS: Tensor, offset: int, dy_BSD: Tensor, rate: Tensor
) -> Tensor:
    """dx_t - rate sum_s dy_s dz_t[i_s], (B, T, D)."""
    scores_BTS = torch.gather(dz_BTV, -1, _for_each(keys_BS, offset, dx_BTD))
    return torch.baddbmm(dx_BTD, _descending(scores_BTS, rate), dy_BSD)


def _descending(scores: Tensor, rate: Tensor) -> Tensor:
    """-rate * scores, (B, T, S)."""
    each = rate if rate.ndim == 0 else rate.to(scores.dtype).unsqueeze(-1).unsqueeze(-1)
    return scores * -each


def _for_each(index_BN: Tensor, offset: int, tokens_BMD: Tensor) -> Tensor:
    """index + offset for each of some other tokens, (B, M, N)."""
    shift_BM1 = torch.full_like(tokens_BMD[..., :1], offset, dtype=torch.int64)
    return index_BN.unsqueeze(-2) + shift_BM1
