"""What a simulator reads. Legend: B sequences, T tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypedDict

from torch import Tensor

from tintc.ir.errors import InputError


class Prompt(TypedDict):
    """Fields of a batch by name, as calls take them that train nothing."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None


class Trained(Prompt):
    """The same, as calls take them that train."""

    train_mask: Tensor
    loss_mask: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Sequences as a caller gives them; `runtime/inputs.py` checks them. Masks are 0 and 1, of any
    type.
    """

    input_ids: Tensor  # (B, T)
    # (B, T): position t carries loss iff train_mask[t + 1] is 1; its target is token t + 1. None:
    # nothing is trained.
    train_mask: Tensor | None = None
    loss_mask: Tensor | None = None  # (B, T): narrows the targets
    # (B, T) with 0 on padding, or (B, T, T); always combined with the causal mask
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None  # (B, T); by default counted over tokens that are no padding

    def __len__(self) -> int:
        return len(self.input_ids)

    def prompt(self) -> Prompt:
        """What a call reads that trains nothing: `simulator.predict_initial(**batch.prompt())`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def trained(self) -> Trained:
        """What a call reads that trains: `simulator(**batch.trained())`."""
        assert self.train_mask is not None
        return {**self.prompt(), "train_mask": self.train_mask, "loss_mask": self.loss_mask}

    def targets(self) -> Tensor:
        """(B, T) bool: tokens that are trained on as targets of those before them."""
        assert self.train_mask is not None
        train_BT = self.train_mask != 0
        return train_BT if self.loss_mask is None else train_BT & (self.loss_mask != 0)

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the sequences."""
        return Batch(*(None if x is None else x[start:stop] for x in self._fields()))  # type: ignore[arg-type]

    def row(self, index: int) -> Batch:
        """One sequence, counted from the end if negative. Raises InputError if there is none, or
        if a mask holds other sequences.
        """
        batch = len(self.input_ids) if self.input_ids.ndim else 0
        if not isinstance(index, int) or not -batch <= index < batch:
            raise InputError(f"index is {index!r}; the batch has {batch} sequences")
        for field, value in zip(fields(self), self._fields(), strict=True):
            if isinstance(value, Tensor) and (value.ndim == 0 or len(value) != batch):
                raise InputError(
                    f"{field.name} has shape {tuple(value.shape)}; expected {batch} sequences, "
                    "those of input_ids"
                )
        return self.rows(index % batch, index % batch + 1)

    def first_tokens(self, tokens: int) -> Batch:
        """The first tokens of every sequence."""
        train, loss, positions = (
            None if x is None else x[:, :tokens]
            for x in (self.train_mask, self.loss_mask, self.position_ids)
        )
        attention = self.attention_mask
        if attention is not None:
            attention = attention[(slice(None), *(slice(tokens),) * (attention.ndim - 1))]
        return Batch(self.input_ids[:, :tokens], train, loss, attention, positions)

    def _fields(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))
