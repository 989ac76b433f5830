"""What a simulator's calls return. Legend: B sequences, T tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from tintc.ir.errors import UsageError
from tintc.runtime.showing.of_outputs import NEEDED, Asked, losses_of, row_of, shown
from tintc.runtime.showing.shown import Shown


@dataclass(frozen=True)
class _Told:
    """Knows what the call was asked, where it came from one. That is no part of the output: a
    program that torch.export makes of a simulator does not return it.
    """

    asked: Asked | None = field(default=None, init=False, repr=False, compare=False)

    def of(self, asked: Asked) -> Self:
        """Itself, which now knows; not while torch traces, when there are no tokens yet."""
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "asked", asked)
        return self


@dataclass(frozen=True)
class SimulatorOutput(_Told):
    """logits: (B, T, V) under each sequence's updated weights. initial_logits: (B, T, V) before any
    update, if asked for.
    loss, initial_loss: mean next-token cross-entropy over the labels that are not -100, if labels
    were given."""

    logits: Tensor
    initial_logits: Tensor | None = None
    loss: Tensor | None = None
    initial_loss: Tensor | None = None

    def show(self, tokenizer: Any, index: int = 0) -> Shown:
        """The tokens of sequence `index`, coloured by how their losses changed: in a notebook, or
        printed by rich; str() of it has marks instead.

        tokenizer: the simulator's own, or whatever has `decode(ids)`. Needs the logits of all
        tokens before and after, so a call with return_initial=True. Raises UsageError without
        them, InputError if there is no such sequence.
        """
        asked = row_of(self.asked, index)
        if self.initial_logits is None:
            raise UsageError(f"the output holds no initial_logits; {NEEDED}")
        ids = asked.batch.input_ids[0]
        if self.logits.shape[1] != len(ids):
            raise UsageError(
                f"the output holds the logits of {self.logits.shape[1]} of {len(ids)} positions; "
                "leave out logits_to_keep, or take simulator.losses(input_ids, train_mask, "
                "labels=input_ids, return_initial=True).show(tokenizer)"
            )
        before, after = (
            losses_of(each[index].detach(), ids) for each in (self.initial_logits, self.logits)
        )
        return shown(asked, tokenizer, before, after)


@dataclass(frozen=True)
class SimulatorLosses(_Told):
    """losses: (B, T), at position t that of token t + 1, -log p(label); 0 where the label is -100
    and at the last position, in at least float32. initial_losses: the same before any update, if
    asked for. loss: the mean over the labels that are not -100."""

    losses: Tensor
    loss: Tensor
    initial_losses: Tensor | None = None

    def show(self, tokenizer: Any, index: int = 0) -> Shown:
        """As `SimulatorOutput.show`; tokens whose label is another, or -100, have no loss."""
        asked = row_of(self.asked, index)
        if self.initial_losses is None:
            raise UsageError(f"the output holds no initial_losses; {NEEDED}")
        before, after = (each[index, :-1].detach() for each in (self.initial_losses, self.losses))
        return shown(asked, tokenizer, before, after)


torch.export.register_dataclass(SimulatorOutput)
