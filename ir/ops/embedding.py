"""Token and position embeddings and the training segment's slices: forward only, never trained."""

import torch.nn.functional as F
from torch import Tensor


def embedding(table: Tensor, index_BT: Tensor, offset: int) -> Tensor:
    """Row index + offset of a table, (V, D) or (1, V, D), as (B, T, D). Some models' positions
    start at row 2.
    """
    return F.embedding(
        index_BT + offset if offset else index_BT, table if table.ndim == 2 else table.squeeze(0)
    )


def segment(x: Tensor, length: int) -> Tensor:
    """The first `length` tokens of (B, T, ...): a causal model's training pass needs no others."""
    return x[:, :length]


def kept_tokens(x_BTD: Tensor, kept_K: Tensor) -> Tensor:
    """The tokens at these positions, (B, K, D): of others no logits are wanted."""
    return x_BTD.index_select(1, kept_K)


def segment_mask(mask_BxTT: Tensor, length: int) -> Tensor:
    """The first `length` queries and keys of an attention mask."""
    return mask_BxTT[..., :length, :length]
