"""Keys and values of a stream's earlier tokens, as they were when their chunk was scored.

Rows end in one column, so that tokens of a row are as far apart as their columns are, whatever
stands in front. Legend: B rows, P columns of the cache, at most L; T new tokens, C = P + T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tintc.runtime.masks import past_mask

Slots = dict[str, Tensor]


class KeyCache:
    """The last L tokens of each of B rows. values: name -> (B, P, ...), at first of no tokens.

    lengths: tokens that each row has. next_position: that of its next token.
    """

    def __init__(self, context: int, values: Slots) -> None:
        self.context, self.values = context, values
        batch = next(iter(values.values())).shape[0]
        self.lengths, self.next_position = [0] * batch, [0] * batch

    @property
    def columns(self) -> int:
        """P."""
        return next(iter(self.values.values())).shape[1]

    def clear(self, rows: list[int]) -> None:
        """Forgets all tokens of some rows."""
        for row in rows:
            self.lengths[row] = self.next_position[row] = 0
        self._drop_columns()

    def rows(self, rows: list[int]) -> Slots:
        """Name -> (rows, P, ...)."""
        every = len(rows) == len(self.lengths)
        return {name: value if every else value[rows] for name, value in self.values.items()}

    def positions(self, rows: list[int], valid_BT: Tensor) -> Tensor:
        """(B, T) of the new tokens; padding is where valid is False."""
        first_B1 = torch.tensor([self.next_position[row] for row in rows]).unsqueeze(-1)
        return first_B1 + (valid_BT.to(torch.int64).cumsum(-1) - 1).clamp(min=0)

    def seen(self, rows: list[int]) -> Tensor:
        """(B, P) bool: where the cache holds a token of the row."""
        lengths_B1 = torch.tensor([self.lengths[row] for row in rows]).unsqueeze(-1)
        return torch.arange(self.columns) >= self.columns - lengths_B1

    def mask(self, rows: list[int], valid_BT: Tensor) -> Tensor:
        """(B, 1, T, C) bool: who may look at whom."""
        return past_mask(self.seen(rows), valid_BT, torch.arange(valid_BT.shape[1]))

    def append(self, rows: list[int], new: Slots, lengths: list[int]) -> None:
        """Adds the tokens of some rows, which begin in the first column of `new`, (B, T, ...)."""
        together = [
            min(self.context, self.lengths[r] + n) for r, n in zip(rows, lengths, strict=True)
        ]
        if len(set(lengths)) == 1 and len(rows) == len(self.lengths):
            for name, value in self.values.items():
                self.values[name] = self._last(torch.cat([value, new[name][:, : lengths[0]]], 1))
        else:
            self._append_each(rows, new, lengths, max([*together, *self.lengths]))
        for row, n, total in zip(rows, lengths, together, strict=True):
            self.lengths[row] = total
            self.next_position[row] += n
        self._drop_columns()

    def _append_each(self, rows: list[int], new: Slots, lengths: list[int], columns: int) -> None:
        for name, value in self.values.items():
            wide = value.new_zeros(len(self.lengths), columns, *value.shape[2:])
            old = value[:, max(0, value.shape[1] - columns) :]
            wide[:, columns - old.shape[1] :] = old
            for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
                own = (
                    torch.cat([value[row], new[name][b, :n]])[-columns:] if columns else value[row]
                )
                wide[row, columns - len(own) :] = own
            self.values[name] = wide

    def _last(self, value: Tensor) -> Tensor:
        return value[:, max(0, value.shape[1] - self.context) :].contiguous()

    def _drop_columns(self) -> None:
        """Columns that no row needs any more."""
        unused = self.columns - max(self.lengths)
        if unused > 0:
            self.values = {name: value[:, unused:] for name, value in self.values.items()}
