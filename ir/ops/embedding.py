"""Token and position embeddings and the training segment's slices: forward only, never trained."""

import torch.nn.functional as F
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape


def _embedding_shape(table: Shape, index: Shape, offset: int) -> Shape:
    return (*index, table[-1])


@operator(
    "(Tensor table, Tensor index, int offset) -> Tensor",
    shape=_embedding_shape,
    meaning="rows of a token or position table",
    kind="read",
)
def embedding(table: Tensor, index_BT: Tensor, offset: int) -> Tensor:
    """Row index + offset of a table, (V, D) or (1, V, D), as (B, T, D). Some models' positions
    start at row 2.
    """
    return F.embedding(
        index_BT + offset if offset else index_BT, table if table.ndim == 2 else table.squeeze(0)
    )


def _segment_shape(x: Shape, length: object) -> Shape:
    return (x[0], "S", *x[2:])


@operator(
    "(Tensor(a) x, SymInt length) -> Tensor(a)",
    shape=_segment_shape,
    meaning="first tokens of a sequence",
    kind="read",
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
)
def kept_tokens(x_BTD: Tensor, kept_K: Tensor) -> Tensor:
    """The tokens at these positions, (B, K, D): of others no logits are wanted."""
    return x_BTD.index_select(1, kept_K)


def _segment_mask_shape(mask: Shape, length: object) -> Shape:
    return (*mask[:-2], "S", "S")


@operator(
    "(Tensor(a) mask, SymInt length) -> Tensor(a)",
    shape=_segment_mask_shape,
    meaning="first queries and keys of a mask",
    kind="read",
    dtype="bool",
)
def segment_mask(mask_BxTT: Tensor, length: int) -> Tensor:
    """The first `length` queries and keys of an attention mask."""
    return mask_BxTT[..., :length, :length]
