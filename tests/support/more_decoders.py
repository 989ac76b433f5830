"""Further decoders as public code bases write them, in our own words: parts that stand outside of
what most decoders have. Weights in no block are named `tok`, `pos`, `head` or `aside`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.public_decoders import D, E, H, V, unit


def split(x: Tensor) -> Tensor:
    """(B, T, D) -> (B, H, T, E)."""
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def later(x: Tensor) -> Tensor:
    """(T, T), true where a key is after the query."""
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)


class Attention(nn.Module):
    """Plain, by torch's own operator."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y) for y in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, mix: nn.Module, feed: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mix, self.feed = mix, feed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Plain(nn.Module):
    """Two blocks with the given parts."""

    def __init__(
        self, mix: Callable[[], nn.Module] = Attention, feed: Callable[[], nn.Module] = Feed
    ) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, D), nn.Embedding(64, D)
        self.layers = nn.ModuleList(Block(mix(), feed()) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))

    def last(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.last(self.embedded(ids)))


class LastAlone(Plain):
    """nanoGPT: without targets, logits of the last token alone; the loss is the second value."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        x = self.last(self.embedded(ids))
        if targets is None:
            return self.head(x[:, [-1], :]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1)


class LossFirst(Plain):
    """transformers of old: (loss, logits), and no loss."""

    def forward(self, ids: Tensor) -> Any:
        return None, super().forward(ids)


class TokensFirst(Plain):
    """fairseq: tokens as the first axis, heads folded into the batch, scaling and adding in place,
    sines by positions that are counted without padding, tied head.
    """

    def __init__(self) -> None:
        super().__init__()
        del self.pos, self.norm, self.head
        angles = torch.arange(64.0)[:, None] * torch.exp(torch.arange(D // 2) * -0.8)
        self.register_buffer("sines", torch.cat((angles.sin(), angles.cos()), 1))

    def attend(self, m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        t, b, _ = x.size()
        q, k, v = m.qkv(x).chunk(3, dim=-1)  # type: ignore[operator]
        q = q * E**-0.5
        q, k, v = (y.contiguous().view(t, b * H, E).transpose(0, 1) for y in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2))
        weights += mask.unsqueeze(0)
        out = torch.bmm(F.softmax(weights, dim=-1), v)
        return m.out(out.transpose(0, 1).contiguous().view(t, b, D))  # type: ignore[operator]

    def forward(self, ids: Tensor) -> Any:
        there = ids.ne(V).int()
        places = (torch.cumsum(there, dim=1).type_as(there) * there).long()
        x = math.sqrt(D) * self.tok(ids)
        x += self.sines.index_select(0, places.view(-1)).view(*ids.shape, -1).detach()
        x = x.transpose(0, 1)
        mask = torch.zeros(x.size(0), x.size(0)).fill_(float("-inf")).triu(1).to(x)
        for layer in self.layers:
            x = layer.norm1(x + self.attend(layer.mix, x, mask))  # type: ignore[arg-type, operator]
            x = layer.norm2(x + layer.feed(x))  # type: ignore[operator]
        return F.linear(x.transpose(0, 1), self.tok.weight), {"attn": [None]}


class Registers(Plain):
    """x-transformers: learned vectors in front of the tokens, which every token sees."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(2, D))

    def forward(self, ids: Tensor) -> Any:
        front = self.memory[None].expand(ids.shape[0], -1, -1)
        return self.head(self.last(torch.cat((front, self.embedded(ids)), 1))[:, 2:])


class LongConvolution(nn.Module):
    """Hyena and S4D: a kernel as long as the text, from powers of complex numbers, by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.rate, self.turn = nn.Parameter(torch.rand(D, 3)), nn.Parameter(torch.rand(D, 3))
        self.size, self.skip = nn.Parameter(torch.randn(D, 3)), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        value, gate = self.into(x).transpose(1, 2).chunk(2, dim=1)
        power = (-self.rate.exp() + 1j * self.turn)[..., None] * torch.arange(t, device=x.device)
        kernel = 2 * torch.einsum("dn,dnt->dt", self.size.to(power.dtype), power.exp()).real
        spectrum = torch.fft.rfft(kernel, n=2 * t) * torch.fft.rfft(value, n=2 * t)
        y = torch.fft.irfft(spectrum, n=2 * t)[..., :t] + self.skip[:, None] * value
        return self.out((y * gate).transpose(1, 2))


class Relative(nn.Module):
    """Transformer-XL: learned biases of queries, scores of distances shifted into their places."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.distance = nn.Linear(D, D, bias=False)
        self.of_keys, self.of_distances = (nn.Parameter(torch.randn(H, 1, E)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        back = torch.arange(t - 1, -1, -1.0, device=x.device, dtype=x.dtype)
        angles = torch.outer(back, 100.0 ** -torch.arange(0, 1, 2 / D, dtype=x.dtype))
        far = self.distance(torch.cat((angles.sin(), angles.cos()), -1)).view(t, H, E)
        q, k, v = (split(y) for y in self.qkv(x).chunk(3, -1))
        shifted = torch.einsum("bhie,jhe->bhij", q + self.of_distances, far)
        shifted = F.pad(shifted, (1, 0)).view(b, H, t + 1, t)[:, :, 1:].view(b, H, t, t)
        scores = ((q + self.of_keys) @ k.mT + shifted) / E**0.5
        weights = scores.masked_fill(later(x), -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Deviation(nn.Module):
    """The Annotated Transformer's norm: (x - mean) / (deviation + eps), not a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        deviation = x.std(-1, keepdim=True)
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (deviation + 1e-6) + self.b_2


class Annotated(Plain):
    """The Annotated Transformer: its own norms, log-probabilities as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Deviation()
        for layer in self.layers:
            layer.norm1, layer.norm2 = Deviation(), Deviation()

    def forward(self, ids: Tensor) -> Any:
        return F.log_softmax(super().forward(ids), dim=-1)


class Hashed(Plain):
    """BLT: tables of hashed pairs of bytes; as makemore, a row for a token that only begins."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.aside = nn.Embedding(V + 1, D), nn.Embedding(31, D)

    def forward(self, ids: Tensor) -> Any:
        before = torch.roll(ids, 1, 1)
        before[:, 0] = V
        pairs = (ids * 1000003 + before * 10007 + (before >> 1)) % 31
        x = self.embedded(ids) + self.aside(pairs) + self.tok(before)
        return self.head(self.last(x))


class Gated(Attention):
    """modded-nanogpt: values mixed with a table's, heads that see their keys one token late."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.tensor([0.6, 0.4]))

    def attended(self, x: Tensor, values: Tensor) -> Tensor:
        q, k, v = (split(y) for y in self.qkv(x).chunk(3, -1))
        q, k = unit(q), unit(k)
        k = torch.cat((k[..., :2], F.pad(k[..., 2:], (0, 0, 1, 0))[:, :, :-1]), -1)
        v = self.mixing[0] * v + self.mixing[1] * split(values)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=~later(x), scale=0.3)
        return self.out(out.transpose(1, 2).flatten(2))


class UnevenBlock(nn.Module):
    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.mix, self.feed = Gated() if attends else None, Feed()

    def forward(self, x: Tensor, first: Tensor, values: Tensor, numbers: Tensor) -> Tensor:
        x = numbers[0] * x + numbers[1] * first
        if self.mix is not None:
            x = x + self.mix.attended(unit(x), values)
        return x + self.feed(unit(x))


class Uneven(nn.Module):
    """modded-nanogpt: one block has no attention; all learned numbers in one vector; a head that is
    cut to the vocabulary; the input mixed in, and a part of what an earlier block gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.aside = nn.Embedding(V, D), nn.Embedding(V, D)
        self.blocks = nn.ModuleList(UnevenBlock(i != 1) for i in range(3))
        self.tok_scalars = nn.Parameter(torch.tensor([0.9, 0.1, 1.1, 0.2, 1.0, 0.3, 0.5]))
        self.head = nn.Linear(D, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = first = unit(self.tok(ids))
        values, numbers, kept = self.aside(ids), self.tok_scalars, []
        for block, own in zip(self.blocks, numbers[:-1].view(3, 2), strict=True):
            x = x + torch.sigmoid(numbers[-1]) * kept[0] if len(kept) == 2 else x
            x = block(x, first, values, own)
            kept.append(x)
        return 30 * torch.sigmoid(self.head(unit(x))[..., :V] / 7.5)


def normed_weights() -> nn.Module:
    """torch's weight norm on a feed-forward's first layer."""
    feed = Feed()
    parametrizations.weight_norm(feed.up)
    return feed


MORE: dict[str, Callable[[], nn.Module]] = {
    "last token alone": LastAlone,
    "loss first": LossFirst,
    "tokens first": TokensFirst,
    "registers in front": Registers,
    "long convolutions": lambda: Plain(LongConvolution),
    "relative positions": lambda: Plain(Relative),
    "norms of deviations": Annotated,
    "hashed pairs": Hashed,
    "a block without attention": Uneven,
    "weight norm": lambda: Plain(feed=normed_weights),
}
