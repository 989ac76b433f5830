"""The windows of a stream: which tokens are run for a chunk of targets, and where these stand.

    row of a batch:  [padding] [context, at most L] [one token for each target] [padding]

Context and targets of all rows meet in one column, so the scored positions are the last K columns
of every row. Padding changes nothing: no token looks at it, and positions count without it.
Legend: B sequences, T = P + K tokens, K targets at most C, n of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a label without a target


@dataclass(frozen=True)
class Fresh:
    """New tokens of one row, in the order of its text. begins: the first of them starts a document,
    so that it is no target.
    """

    tokens: Tensor  # (n,) int64, on the host
    begins: bool

    @property
    def targets(self) -> Tensor:
        """(n,) those that are scored and trained on."""
        return self.tokens[1:] if self.begins else self.tokens


@dataclass(frozen=True)
class Window:
    """Tensors of some rows, on the host. before: columns in front of the scored ones."""

    input_ids: Tensor  # (B, T), 0 at padding
    labels: Tensor  # (B, T), IGNORED where there is no target
    valid: Tensor  # (B, T) bool: no padding
    before: int

    @property
    def scored(self) -> Tensor:
        """(K,) the columns where loss stands."""
        return torch.arange(self.before, self.input_ids.shape[1])


def window(contexts: list[Tensor], fresh: list[Fresh]) -> Window:
    """contexts: of each row the tokens in front of its fresh ones, whose last predicts the first
    of these.
    """
    rows = [torch.cat([c, f.tokens])[:-1] for c, f in zip(contexts, fresh, strict=True)]
    scored = [len(f.targets) for f in fresh]
    before = max(len(row) - n for row, n in zip(rows, scored, strict=True))
    tokens = before + max(scored)
    ids = torch.zeros(len(rows), tokens, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for b, (row, n) in enumerate(zip(rows, scored, strict=True)):
        columns = slice(before - (len(row) - n), before + n)
        ids[b, columns], valid[b, columns] = row, True
        labels[b, before : before + n] = fresh[b].targets
    return Window(ids, labels, valid, before)
