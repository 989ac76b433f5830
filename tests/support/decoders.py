"""Decoders written by hand in plain PyTorch, without transformers' code: common spellings of each
part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import randomized

VOCAB, HIDDEN, HEADS, FFN, LAYERS, POSITIONS = 29, 12, 3, 20, 2, 32


class RMSNorm(nn.Module):
    """LLaMA's own spelling."""

    def __init__(self, hidden: int = HIDDEN, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


class MaskedAttention(nn.Module):
    """nanoGPT without flash attention: a buffer of ones as mask, minus infinity, softmax, att @
    v.
    """

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.dropout = (
            nn.Linear(HIDDEN, 3 * HIDDEN),
            nn.Linear(HIDDEN, HIDDEN),
            nn.Dropout(0.1),
        )
        self.register_buffer(
            "bias", torch.tril(torch.ones(POSITIONS, POSITIONS)).view(1, 1, POSITIONS, POSITIONS)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (heads(y, HEADS) for y in self.c_attn(x).split(hidden, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = self.dropout(F.softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, hidden))


class RotaryAttention(nn.Module):
    """Grouped queries; the two halves of each head are rotated apart and joined again."""

    def __init__(self, width: int = 6, queries: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.queries, self.groups = queries, groups
        self.wq, self.wo = (
            nn.Linear(HIDDEN, queries * width, bias=False),
            nn.Linear(queries * width, HIDDEN, bias=False),
        )
        self.wk, self.wv = (nn.Linear(HIDDEN, groups * width, bias=False) for _ in range(2))
        self.register_buffer(
            "frequencies", 100.0 ** (-torch.arange(0, width, 2) / width), persistent=False
        )

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(
            torch.arange(x.shape[2], device=x.device).to(x.dtype), self.frequencies
        )
        cos, sin = angles.cos(), angles.sin()
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            heads(self.wq(x), self.queries),
            heads(self.wk(x), self.groups),
            heads(self.wv(x), self.groups),
        )
        q, k = self.rotate(q), self.rotate(k)
        k, v = (y.repeat_interleave(self.queries // self.groups, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class ComplexRotaryAttention(RotaryAttention):
    """Neighbours turn as one complex number."""

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(
            torch.arange(x.shape[2], device=x.device).to(x.dtype), self.frequencies
        )
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn
        return torch.view_as_real(turned).flatten(3)


class AlibiAttention(nn.Module):
    """Slopes times distances added to the scores, and a triangle of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = (
            nn.Linear(HIDDEN, 3 * HIDDEN, bias=False),
            nn.Linear(HIDDEN, HIDDEN, bias=False),
        )
        self.register_buffer(
            "slopes", torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])
        )

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = (heads(y, HEADS) for y in self.qkv(x).chunk(3, dim=-1))
        index = torch.arange(length, device=x.device)
        distances = index[None, :] - index[:, None]
        scores = (
            q @ k.transpose(-2, -1) / math.sqrt(HIDDEN // HEADS)
            + self.slopes[:, None, None] * distances
        )
        scores = scores + torch.full(
            (length, length), float("-inf"), dtype=x.dtype, device=x.device
        ).triu(1)
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class SwiGLU(nn.Module):
    """Gate and up projection in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.act, self.down = (
            nn.Linear(HIDDEN, 2 * FFN, bias=False),
            nn.SiLU(),
            nn.Linear(FFN, HIDDEN, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Block(nn.Module):
    """Pre-norm; `scaled` multiplies each branch by learned numbers per channel (LayerScale)."""

    def __init__(
        self, attention: nn.Module, ffn: nn.Module, norm: Callable[[int], nn.Module], scaled: bool
    ) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = norm(HIDDEN), attention, norm(HIDDEN), ffn
        self.scaled = scaled
        if scaled:
            self.gamma_1, self.gamma_2 = (
                nn.Parameter(torch.ones(HIDDEN)),
                nn.Parameter(torch.ones(HIDDEN)),
            )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(self.ln_1(x))
        x = x + (self.gamma_1 * branch if self.scaled else branch)
        branch = self.mlp(self.ln_2(x))
        return x + (self.gamma_2 * branch if self.scaled else branch)


def sines() -> Tensor:
    """(POSITIONS, HIDDEN): sines in even channels, cosines in odd ones."""
    angles = torch.arange(POSITIONS)[:, None] * torch.exp(
        torch.arange(0, HIDDEN, 2) * (-math.log(100.0) / HIDDEN)
    )
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class Decoder(nn.Module):
    """positions: `embedding` looks a table up, `parameter` and `buffer` slice one, "" leaves them
    to the attention.
    """

    def __init__(
        self,
        attention: Callable[[], nn.Module],
        ffn: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        positions: str = "embedding",
        scaled: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCAB, HIDDEN)
        self.pos = nn.Embedding(POSITIONS, HIDDEN) if positions == "embedding" else None
        if positions == "parameter":
            self.table = nn.Parameter(torch.zeros(POSITIONS, HIDDEN))
        elif positions == "buffer":
            self.register_buffer("pe", sines())
        self.positions = positions
        self.layers = nn.ModuleList(Block(attention(), ffn(), norm, scaled) for _ in range(LAYERS))
        self.norm, self.head = norm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tok(ids)
        if self.pos is not None:
            x = x + self.pos(torch.arange(length, device=ids.device))
        elif self.positions == "parameter":
            x = x + self.table[:length]
        elif self.positions == "buffer":
            x = x + self.pe[:length]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _decoder(*parts: Callable[[], nn.Module], **options: object) -> Callable[..., nn.Module]:
    def build(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        model: nn.Module = randomized(Decoder(*parts, **options).to(dtype), seed)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gamma" in name:
                    parameter.add_(1)
        return model

    return build


DECODERS: dict[str, Callable[..., nn.Module]] = {
    "hand-nanogpt": _decoder(MaskedAttention, FeedForward, tied=True),
    "hand-llama": _decoder(RotaryAttention, SwiGLU, norm=RMSNorm, positions=""),
    "hand-torch-rmsnorm": _decoder(
        RotaryAttention, FeedForward, norm=partial(nn.RMSNorm, eps=1e-4), positions="parameter"
    ),
    "hand-complex-rotary": _decoder(ComplexRotaryAttention, SwiGLU, norm=RMSNorm, positions=""),
    "hand-sinusoidal": _decoder(MaskedAttention, FeedForward, positions="buffer"),
    "hand-position-parameter": _decoder(MaskedAttention, SwiGLU, positions="parameter"),
    "hand-layerscale": _decoder(MaskedAttention, FeedForward, scaled=True),
    "hand-alibi": _decoder(AlibiAttention, SwiGLU, norm=RMSNorm, positions="", scaled=True),
}
