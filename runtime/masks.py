"""What follows from a batch's masks and positions, as TINT.md section 1 says.

Plain torch code, without a branch on a value and without a size: the ONNX export runs it on values
that write nodes (`compiler/onnx/inputs.py`), so it stands here once. Nothing is checked here.
Legend: B sequences, T tokens; columns_T is 0, 1, ..., T - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.inputs import LENGTH, TRAINED_LENGTH
from tintc.runtime.batch import Batch


@dataclass(frozen=True)
class Completed:
    """A lowered graph's inputs that follow from a batch."""

    tensors: dict[str, Tensor]  # by name, as `ir/inputs.py` lists them
    carries_BT: Tensor  # bool: the positions that carry loss
    valid_BT: Tensor | None  # bool: tokens that are no padding; None for all


def complete(
    batch: Batch, columns_T: Tensor, dtype: torch.dtype, *, by_length: bool = False
) -> Completed:
    """Masks of who looks at whom and of what carries loss, positions, and targets.

    batch: int64 ids and positions. dtype: of the loss mask. Position t carries loss iff token t + 1
    is a target and neither token is padding. by_length: also how many positions each sequence has.
    """
    attention = None if batch.attention_mask is None else batch.attention_mask != 0
    allowed_BxTT, valid_BT = _allowed(attention, columns_T)
    positions_BT = batch.position_ids
    if positions_BT is None:
        positions_BT = _positions(batch.input_ids, valid_BT, columns_T)
    carries_BT = carries_loss(batch.targets(), valid_BT)
    tensors = {
        "input_ids": batch.input_ids,
        "position_ids": positions_BT,
        "attention_mask": allowed_BxTT,
        "targets": next_token(batch.input_ids),
        "loss_mask": carries_BT.to(dtype),
    }
    if by_length:
        tensors |= _lengths(positions_BT, batch.train_mask, valid_BT, columns_T)
    return Completed(tensors, carries_BT, valid_BT)


def _lengths(
    positions_BT: Tensor, train_mask: Tensor | None, valid_BT: Tensor | None, columns_T: Tensor
) -> dict[str, Tensor]:
    """(B, 1): one more than the greatest position of each text, and of its tokens up to the last
    one of the training segment; where there is none, of all. Padding has no position.
    """
    known_BT = positions_BT if valid_BT is None else torch.where(valid_BT, positions_BT, 0)
    found = {LENGTH: known_BT.amax(-1, keepdim=True) + 1}
    found[TRAINED_LENGTH] = found[LENGTH]
    if train_mask is not None:
        train_BT = train_mask != 0 if valid_BT is None else (train_mask != 0) & valid_BT
        last_B1 = torch.where(train_BT, columns_T, -1).amax(-1, keepdim=True)
        within_BT = torch.ge(last_B1, columns_T) | ~torch.ge(last_B1, 0)
        found[TRAINED_LENGTH] = torch.where(within_BT, known_BT, 0).amax(-1, keepdim=True) + 1
    return found


def past_mask(seen_BP: Tensor, valid_BT: Tensor, columns_T: Tensor) -> Tensor:
    """(B, 1, T, P + T) bool: who of T new tokens may look at whom, where P earlier ones stand in
    front. seen: those of the earlier ones that are there, valid: of the new ones.
    """
    allowed_BxTT, _ = _allowed(valid_BT, columns_T)
    past_BTP = seen_BP[:, None].expand(-1, valid_BT.shape[1], -1)
    return torch.cat([past_BTP[:, None], allowed_BxTT], -1)


def carries_loss(targets_BT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
    """(B, T) bool: positions whose next token is a target; neither of both may be padding."""
    carries_BT = next_token(targets_BT)
    return carries_BT if valid_BT is None else carries_BT & valid_BT & next_token(valid_BT)


def next_token(x_BT: Tensor, last: int = 0) -> Tensor:
    """At position t what stands at t + 1; `last` at the end."""
    return F.pad(x_BT[:, 1:], (0, 1), value=last)


def segment_length(carries_BT: Tensor, columns_T: Tensor) -> Tensor:
    """(): one more than the last position that carries loss in any sequence, at least 1: the tokens
    that training passes need.
    """
    return torch.where(carries_BT, columns_T + 1, 1).amax()


def rest_begins(train_BT: Tensor, valid_BT: Tensor | None, columns_T: Tensor) -> Tensor:
    """(): the first position that predicts a token behind the training segment, in any sequence:
    that of the last training token that is no padding, or 0 where there is none.
    """
    trained_BT = train_BT if valid_BT is None else train_BT & valid_BT
    return torch.where(trained_BT, columns_T, 0).amax(-1).amin()


def _allowed(attention: Tensor | None, columns_T: Tensor) -> tuple[Tensor, Tensor | None]:
    """((B or 1, 1, T, T) mask of who may look at whom, (B, T) mask of tokens that are no padding or
    None).

    A row that may look at nothing (padding) looks at itself instead: its result reaches no other
    row. Under a (B, T, T) mask, padding is what no position may look at.
    """
    rows_T1 = columns_T.unsqueeze(-1)
    causal_TT = torch.ge(rows_T1, columns_T)
    if attention is None:
        return causal_TT[None, None], None
    if attention.ndim == 2:
        valid_BT, allowed_BTT = attention, causal_TT & attention[:, None]
    else:
        allowed_BTT = causal_TT & attention
        valid_BT = allowed_BTT.any(-2)
    itself_TT = torch.eq(rows_T1, columns_T)
    allowed_BTT = allowed_BTT | (itself_TT & ~allowed_BTT.any(-1, keepdim=True))
    return allowed_BTT[:, None], valid_BT


def _positions(ids_BT: Tensor, valid_BT: Tensor | None, columns_T: Tensor) -> Tensor:
    """Positions counted over tokens that are no padding, so that padding on either side changes
    nothing.
    """
    if valid_BT is None:
        return columns_T.expand(*ids_BT.shape)
    return (valid_BT.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
