"""Token and position embeddings, and the training segment's slices.

Shapes: B sequences, T tokens, V rows, D width. A table is shared, (V, D), before the first descent
and belongs to each sequence, (B, V, D), after it.
Source: TINT.md sections 2 and 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.rates import along
from tintc.ir.ops.shapes import (
    demand,
    demand_activation,
    demand_rate,
    demand_weight,
    each_matrix,
    said,
)
from tintc.ir.precision import wide, wide_dtype


def _demand_rows(table: Shape, index: Shape, offset: int) -> None:
    demand(
        len(table) == 2 or (len(table) == 3 and table[0] in (1, index[0])),
        f"a table has shape {said(table)}; expected (V, D)",
    )
    demand(len(index) == 2, f"an index has shape {said(index)}; expected (B, T)")
    demand(offset >= 0, f"a table starts at row {offset}; expected at least 0")


def _embedding_shape(table: Shape, index: Shape, offset: int, padding: int = -1) -> Shape:
    demand(len(index) == 2, f"an index has shape {said(index)}; expected (B, T)")
    _demand_rows(table, index, offset)
    return (*index, table[-1])


@operator(
    "(Tensor table, Tensor index, int offset, int padding=-1) -> Tensor",
    shape=_embedding_shape,
    meaning="rows of a token or position table",
    takes={"index": "int"},
    weights=("table",),
)
def embedding(table: Tensor, index_BT: Tensor, offset: int, padding: int = -1) -> Tensor:
    """Row index + offset of a table, (V, D), (1, V, D) or one a sequence, as (B, T, D). Some
    models' positions start at row 2. padding: a row that gets no gradient from here, torch's
    `padding_idx`; -1 for none.
    """
    rows_BT = index_BT + offset if offset else index_BT
    if table.ndim == 2:
        return F.embedding(rows_BT, table)
    if table.shape[0] == 1:
        return F.embedding(rows_BT, table.squeeze(0))
    return torch.gather(table, 1, _along_width(rows_BT, table))


def _along_width(rows_BT: Tensor, values: Tensor) -> Tensor:
    """An index of rows as one of numbers, (B, T, D)."""
    return rows_BT.unsqueeze(-1).expand(-1, -1, values.shape[-1])


def _without_padding_shape(dy: Shape, index: Shape, padding: int) -> Shape:
    demand_activation(dy)
    demand(index == dy[:-1], f"dy is {said(dy)} and an index {said(index)}; expected its tokens")
    return dy


@operator(
    "(Tensor dy, Tensor index, int padding) -> Tensor",
    shape=_without_padding_shape,
    meaning="dy, and 0 where a token reads the padding row",
    kind="backward",
    takes={"index": "int"},
)
def without_padding(dy_BTD: Tensor, index_BT: Tensor, padding: int) -> Tensor:
    """dy_t, or 0 where index_t is `padding`: as torch.nn.Embedding's `padding_idx`."""
    return dy_BTD * (index_BT != padding).unsqueeze(-1).to(dy_BTD.dtype)


def _descent_shape(table: Shape, dy: Shape, index: Shape, offset: int, rate: Shape) -> Shape:
    demand_activation(dy)
    demand(index == dy[:-1], f"dy is {said(dy)} and an index {said(index)}; expected its tokens")
    _demand_rows(table, index, offset)
    demand_weight(table, dy[0], table[-2], dy[-1])
    demand_rate(rate)
    return each_matrix(table)


@operator(
    "(Tensor table, Tensor dy, Tensor index, int offset, Tensor rate) -> Tensor",
    shape=_descent_shape,
    meaning="E[v] - rate sum of dy where index is v",
    kind="descent",
    takes={"index": "int"},
)
def embedding_descent(
    table: Tensor, dy_BTD: Tensor, index_BT: Tensor, offset: int, rate: Tensor
) -> Tensor:
    """E[v] <- E[v] - rate * sum of dy_t over the tokens t whose index + offset is v, one table a
    sequence: (B, V, D).
    """
    rows_BT = index_BT + offset if offset else index_BT
    if table.ndim == 2:  # one copy a sequence
        each_B1 = torch.full_like(index_BT.sum(-1, keepdim=True), 0, dtype=wide_dtype(dy_BTD.dtype))
        before = table + each_B1.unsqueeze(-1)
    else:
        before = wide(table)
    if rate.ndim:  # one of each sequence
        rate = along(rate, dy_BTD, 2)
    return before.scatter_add(1, _along_width(rows_BT, dy_BTD), wide(dy_BTD) * -rate)


def _segment_shape(x: Shape, length: object) -> Shape:
    demand(len(x) >= 2, f"a value has shape {said(x)}; expected (B, T, ...)")
    return (x[0], "S", *x[2:])


@operator(
    "(Tensor(a) x, SymInt length) -> Tensor(a)",
    shape=_segment_shape,
    meaning="first tokens of a sequence",
    kind="read",
    dtype=None,
    takes={"length": "int"},
)
def segment(x: Tensor, length: int) -> Tensor:
    """The first `length` tokens of (B, T, ...): a causal model's training pass needs no others."""
    return x[:, :length]


def _kept_shape(x: Shape, kept: Shape) -> Shape:
    return (x[0], kept[0], *x[2:])


@operator(
    "(Tensor x, Tensor kept) -> Tensor",
    shape=_kept_shape,
    meaning="tokens whose logits are wanted",
    kind="optimization",
    dtype=None,
    takes={"kept": "int"},
)
def kept_tokens(x: Tensor, kept_K: Tensor) -> Tensor:
    """The tokens at these positions, (B, K, ...): of others no logits are wanted."""
    return x.index_select(1, kept_K)


def _kept_queries_shape(mask: Shape, kept: Shape) -> Shape:
    demand(len(mask) == 4, f"a mask has shape {said(mask)}; expected (B, 1, T, C)")
    return (*mask[:2], kept[0], mask[3])


@operator(
    "(Tensor mask, Tensor kept) -> Tensor",
    shape=_kept_queries_shape,
    meaning="what the kept tokens may look at",
    kind="optimization",
    dtype="bool",
    takes={"mask": "bool", "kept": "int"},
)
def kept_queries(mask_BxTC: Tensor, kept_K: Tensor) -> Tensor:
    """Rows of an attention mask, (B or 1, 1, K, C): those of the queries at these positions."""
    return mask_BxTC.index_select(2, kept_K)


def _spread_shape(dy: Shape, kept: Shape, like: Shape) -> Shape:
    demand(len(dy) == 3 and len(like) == 2 and dy[1] == kept[0] and dy[0] == like[0],
           f"{said(dy)} at {said(kept)} positions does not spread over {said(like)}")  # fmt: skip
    return (dy[0], like[1], dy[2])


@operator(
    "(Tensor dy, Tensor kept, Tensor like) -> Tensor",
    shape=_spread_shape,
    meaning="dy at the kept tokens, 0 at all others",
    kind="optimization",
    takes={"kept": "int"},
)
def spread_tokens(dy_BKD: Tensor, kept_K: Tensor, like_BT: Tensor) -> Tensor:
    """The gradient of `kept_tokens`: (B, T, D), dy at these positions and 0 elsewhere. like: any
    number of every token.
    """
    zero_BTD = torch.zeros_like(like_BT).unsqueeze(-1).expand(-1, -1, dy_BKD.shape[-1])
    return zero_BTD.index_copy(1, kept_K, dy_BKD)


def _segment_mask_shape(mask: Shape, length: object) -> Shape:
    demand(len(mask) == 4, f"a mask has shape {said(mask)}; expected (B, 1, T, T)")
    return (*mask[:-2], "S", "S")


@operator(
    "(Tensor(a) mask, SymInt length) -> Tensor(a)",
    shape=_segment_mask_shape,
    meaning="first queries and keys of a mask",
    kind="read",
    dtype="bool",
    takes={"mask": "bool", "length": "int"},
)
def segment_mask(mask_BxTT: Tensor, length: int) -> Tensor:
    """The first `length` queries and keys of an attention mask."""
    return mask_BxTT[..., :length, :length]
