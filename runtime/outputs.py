"""What a simulator's calls return. Legend: B sequences, T tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SimulatorOutput:
    """logits: (B, T, V) under each sequence's updated weights. initial_logits: (B, T, V) before any
    update, if asked for.
    loss, initial_loss: mean next-token cross-entropy over the labels that are not -100, if labels
    were given."""

    logits: Tensor
    initial_logits: Tensor | None = None
    loss: Tensor | None = None
    initial_loss: Tensor | None = None


@dataclass(frozen=True)
class SimulatorLosses:
    """losses: (B, T), at position t that of token t + 1, -log p(label); 0 where the label is -100
    and at the last position, in at least float32. initial_losses: the same before any update, if
    asked for. loss: the mean over the labels that are not -100."""

    losses: Tensor
    loss: Tensor
    initial_losses: Tensor | None = None


torch.export.register_dataclass(SimulatorOutput)
