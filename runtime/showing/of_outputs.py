"""The tokens of one sequence of a call, from what the call returned. Legend: B sequences, T tokens,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.errors import InputError, UsageError
from tintc.ir.precision import wide
from tintc.runtime.batch import Batch
from tintc.runtime.inputs import has_values
from tintc.runtime.showing.shown import Shown
from tintc.runtime.showing.tokens import Decode, TokenLosses

NEEDED = "call the simulator with return_initial=True, as show compares losses before and after"


@dataclass(frozen=True)
class Asked:
    """What a call was asked. labels: (B, T), of which tokens there are losses; None for all."""

    batch: Batch
    labels: Tensor | None = None


def losses_of(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """(T - 1,) -log p of tokens 1, 2, ..., in at least float32."""
    targets = ids_T[1:].to(logits_TV.device)
    return F.cross_entropy(wide(logits_TV[:-1]), targets, reduction="none")


def row_of(asked: Asked | None, index: int) -> Asked:
    """The same of one sequence. Raises UsageError for an output that does not say what it is of,
    InputError for a sequence that there is not.
    """
    if asked is None:
        raise UsageError(
            "this output does not say which tokens it is of, as it did not come from a call of a "
            "simulator itself (but from torch.export, say); expected what the simulator returned"
        )
    batch = asked.batch.row(index)
    if not has_values(batch.input_ids):
        raise UsageError("the tokens are on the meta device, and have no values to show")
    return Asked(batch, None if asked.labels is None else asked.labels[index])


def shown(asked: Asked, tokenizer: Any, before: Tensor, after: Tensor) -> Shown:
    """asked: of one sequence. before, after: (T - 1,) losses of its tokens 1, 2, ... Raises
    UsageError for a tokenizer that has no `decode`.
    """
    decode = decoding(tokenizer)
    ids_T, batch = asked.batch.input_ids[0].cpu(), asked.batch
    real_T = _real(batch, len(ids_T))
    has_T = real_T & F.pad(real_T[:-1], (1, 0))  # the first token has nothing that predicts it
    if asked.labels is not None:
        has_T &= asked.labels.cpu() == ids_T
    losses = [
        [value if has else None for value, has in zip([0.0, *each.tolist()], has_T, strict=True)]
        for each in (before, after)
    ]
    assert batch.train_mask is not None
    rows = zip(ids_T.tolist(), (batch.train_mask[0] != 0).tolist(), *losses, strict=True)
    kept = [row for row, is_real in zip(rows, real_T, strict=True) if is_real]
    if not kept:
        raise InputError("the sequence holds nothing but padding; expected some tokens to show")
    ids, trained, first, last = zip(*kept, strict=True)
    return Shown(TokenLosses.of(ids, decode, trained, first, last))


def _real(batch: Batch, tokens: int) -> Tensor:
    """(T,) bool: tokens that are no padding, which may look at nothing."""
    mask = batch.attention_mask
    if mask is None:
        return torch.ones(tokens, dtype=torch.bool)
    row = mask[0].cpu() != 0
    return row if row.ndim == 1 else row.any(-1)


def decoding(tokenizer: Any) -> Decode:
    """Token ids -> text, special tokens included. Raises UsageError for what has no `decode`."""
    if not callable(getattr(tokenizer, "decode", None)):
        raise UsageError(
            f"tokenizer is {type(tokenizer).__name__}; expected one with decode(ids), "
            "such as simulator.tokenizer, which is None where the source had none"
        )

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    return decode
