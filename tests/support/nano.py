"""A decoder written by hand, in the manner of nanoGPT: compiled like any other, and independent of
transformers' code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import randomized


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.qkv(x).split(hidden, dim=2)
        q, k, v = (
            y.view(batch, length, self.heads, hidden // self.heads).transpose(1, 2)
            for y in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, hidden))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.norm_2 = nn.LayerNorm(hidden, bias=False)
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.drop(self.down(self.act(self.up(self.norm_2(x)))))


class Nano(nn.Module):
    """Pre-norm decoder with learned positions; an untied head that has a bias."""

    def __init__(
        self, vocab: int, hidden: int, heads: int, ffn: int, layers: int, positions: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, ffn) for _ in range(layers))
        self.ln_f = nn.LayerNorm(hidden, eps=1e-4)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(
            torch.arange(input_ids.shape[1], device=input_ids.device)
        )
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def nano(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> Nano:
    """A random one."""
    wanted = {
        "vocab": 19,
        "hidden": 6,
        "heads": 2,
        "ffn": 10,
        "layers": 2,
        "positions": 12,
        **sizes,
    }
    model: Nano = randomized(Nano(**wanted), seed).to(dtype)
    return model
