"""Small modules around which a pass's edge cases are built: token ids in, logits out, one odd thing
in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.models import randomized

Middle = Callable[["Toy", Tensor, Tensor], Tensor]


class Toy(nn.Module):
    """embedding -> middle(self, x, ids) -> head, with a few layers for the middle to use."""

    def __init__(self, middle: Middle, hidden: int = 6, vocab: int = 19) -> None:
        super().__init__()
        self.middle = middle
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(12, hidden)
        self.linear = nn.Linear(hidden, hidden)
        self.wide = nn.Linear(hidden, 3 * hidden)
        self.norm = nn.LayerNorm(hidden)
        self.scale = nn.Parameter(torch.ones(hidden))
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.middle(self, self.tokens(input_ids), input_ids))


def toy(middle: Middle) -> Toy:
    """A random one in float64."""
    model: Toy = randomized(Toy(middle)).double()
    return model
