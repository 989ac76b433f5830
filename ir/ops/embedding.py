"""Token and position embeddings and the training segment's slices: forward only, never trained."""

import torch.nn.functional as F
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.shapes import demand, said


def _embedding_shape(table: Shape, index: Shape, offset: int) -> Shape:
    demand(
        len(table) == 2 or (len(table) == 3 and table[0] == 1),
        f"a table has shape {said(table)}; expected (V, D)",
    )
    demand(len(index) == 2, f"an index has shape {said(index)}; expected (B, T)")
    demand(offset >= 0, f"a table starts at row {offset}; expected at least 0")
    return (*index, table[-1])


@operator(
    "(Tensor table, Tensor index, int offset) -> Tensor",
    shape=_embedding_shape,
    meaning="rows of a token or position table",
    kind="read",
    takes={"index": "int"},
)
def embedding(table: Tensor, index_BT: Tensor, offset: int) -> Tensor:
    """Row index + offset of a table, (V, D) or (1, V, D), as (B, T, D). Some models' positions
    start at row 2.
    """
    return F.embedding(
        index_BT + offset if offset else index_BT, table if table.ndim == 2 else table.squeeze(0)
    )


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
)
def kept_tokens(x_BTD: Tensor, kept_K: Tensor) -> Tensor:
    """The tokens at these positions, (B, K, D): of others no logits are wanted."""
    return x_BTD.index_select(1, kept_K)


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
