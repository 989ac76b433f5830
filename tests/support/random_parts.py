"""Parts of random decoders: norms, layers, activations, attentions, feed-forward networks, each in
one of many spellings that a draw chooses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


class Draw:
    """Choices from one seed, and what was chosen. odd: whether parts may be drawn that tintc does
    not simulate. writes: whether some may write in place; such models are exported twice.
    """

    def __init__(self, seed: int) -> None:
        self.random, self.chosen = random.Random(seed), list[str]()
        self.odd, self.writes = self.random.random() < 0.1, self.random.random() < 0.3

    def pick(self, what: str, options: Sequence[T], weights: Sequence[int] | None = None) -> T:
        """One of the options; what is not the first is noted."""
        choice = self.random.choices(options, weights)[0]
        if choice != options[0]:
            self.chosen.append(f"{what} {choice}")
        return choice

    def often(self, what: str, share: float) -> bool:
        """True in this share of all draws; then it is noted."""
        found = self.random.random() < share
        if found:
            self.chosen.append(what)
        return found


class RMS(nn.Module):
    """gain * x / rms(x), the gain as it is or added to one; spelled in two ways."""

    def __init__(self, width: int, added: bool, root: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if added else torch.ones(width))
        self.added, self.root = added, root

    def forward(self, x: Tensor) -> Tensor:
        gain = 1 + self.weight if self.added else self.weight
        mean = x.pow(2).mean(-1, keepdim=True) + 1e-5
        return gain * (x / mean.sqrt()) if self.root else x * torch.rsqrt(mean) * gain


class SpelledNorm(nn.Module):
    """A LayerNorm out of means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.g * (centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt()) + self.b


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "LayerNorm without bias": lambda width: nn.LayerNorm(width, bias=False),
    "LayerNorm without weights": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "RMS": lambda width: RMS(width, added=False, root=False),
    "RMS of 1 + gain": lambda width: RMS(width, added=True, root=False),
    "RMS by a root": lambda width: RMS(width, added=False, root=True),
    "torch's RMSNorm": lambda width: nn.RMSNorm(width, eps=1e-4),
    "a spelled LayerNorm": SpelledNorm,
    "no norm": lambda width: nn.Identity(),
}


class Dense(nn.Module):
    """x W^T + b, spelled as `how` says."""

    def __init__(self, width: int, out: int, how: str, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*((width, out) if how == "addmm" else (out, width))))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "addmm" and self.bias is not None:
            flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
            return flat.view(*x.shape[:-1], -1)
        y = {
            "linear": lambda: F.linear(x, self.weight),
            "matmul": lambda: x @ self.weight.t(),
            "mT": lambda: torch.matmul(x, self.weight.mT),
            "einsum": lambda: torch.einsum("bti,oi->bto", x, self.weight),
            "addmm": lambda: x @ self.weight,
        }[self.how]()
        return y if self.bias is None else y + self.bias


def dense(draw: Draw, width: int, out: int, bias: bool = True) -> nn.Module:
    """A linear layer in one of its spellings."""
    spelled = ("nn.Linear", "linear", "matmul", "mT", "addmm", "einsum")
    how = draw.pick("linear as", spelled, (8, 1, 1, 1, 1, int(draw.odd)))
    return nn.Linear(width, out, bias=bias) if how == "nn.Linear" else Dense(width, out, how, bias)


def _in_place(x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    change(x)
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "x sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "relu squared": lambda x: F.relu(x).square(),
    "clamp": lambda x: x.clamp(min=0),
    "maximum": lambda x: torch.maximum(x, x.new_zeros(())),
}
WRITING_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda x: _in_place(x, lambda y: y.relu_()),
    "silu in place": lambda x: F.silu(x, inplace=True),
    "halved in place": lambda x: F.gelu(_in_place(x * 1.0, lambda y: y.mul_(0.5))),
    "halved through a view": lambda x: F.gelu(
        _in_place(x * 1.0, lambda y: y.unflatten(-1, (1, -1)).mul_(0.5))
    ),
    "doubled in part": lambda x: F.gelu(_in_place(x * 1.0, lambda y: y[..., ::2].mul_(2))),
}
ODD_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a maximum of tensors": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "absolute": torch.abs,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "mish": F.mish,
}


def activation(draw: Draw) -> Callable[[Tensor], Tensor]:
    """A function of each number, often one with a kink."""
    known = ACTIVATIONS | (WRITING_ACTIVATIONS if draw.writes else {})
    known |= ODD_ACTIVATIONS if draw.odd else {}
    return known[draw.pick("activation", tuple(known))]


class FeedForward(nn.Module):
    """down(a(up(x))), or gated: down(a(gate(x)) * up(x))."""

    def __init__(self, draw: Draw, width: int) -> None:
        super().__init__()
        self.act, self.ffn = activation(draw), width + draw.random.randint(1, 4)
        self.gate = draw.pick("feed-forward", ("plain", "gated", "gated by halves"), (3, 1, 1))
        self.up = dense(draw, width, self.ffn * (2 if self.gate == "gated by halves" else 1))
        if self.gate == "gated":
            self.gating = dense(draw, width, self.ffn, bias=False)
        self.down = dense(draw, self.ffn, width, bias=draw.random.random() < 0.7)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.gate == "gated by halves":
            first, second = y.chunk(2, -1)
            y = self.act(first * 1) * second
        elif self.gate == "gated":
            y = self.act(self.gating(x)) * y
        else:
            y = self.act(y)
        return self.drop(self.down(y))


def _causal(x: Tensor) -> Tensor:
    size = x.shape[1]
    return torch.ones(size, size, dtype=torch.bool, device=x.device).tril()


def _behind(x: Tensor) -> Tensor:
    index = torch.arange(x.shape[1], device=x.device)
    return index[:, None] - index[None, :]


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions on (B, H, T, E)."""
    half = x.shape[-1] // 2
    rates = 10.0 ** -(torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = torch.outer(torch.arange(x.shape[2], device=x.device).to(x.dtype), rates)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    """Causal attention of a few heads; `turned` where nothing else tells positions."""

    def __init__(self, draw: Draw, width: int, turned: bool) -> None:
        super().__init__()
        self.heads, self.size = draw.pick("heads", (2, 1, 3), (4, 1, 1)), 4
        self.groups = draw.pick("grouped queries", (self.heads, 1), (3, 1))
        bias = draw.random.random() < 0.6
        inner, shared = self.heads * self.size, self.groups * self.size
        layouts = ("apart", "chunks", "split", "by heads")
        self.layout = draw.pick("projections", layouts, (3, 1, 1, 1))
        if self.layout == "by heads" and self.groups != self.heads:
            self.layout = "split"
        if self.layout == "chunks" and self.groups != self.heads:
            self.layout = "apart"
        if self.layout == "apart":
            self.q, self.k, self.v = (dense(draw, width, n, bias) for n in (inner, shared, shared))
        else:
            self.qkv = dense(draw, width, inner + 2 * shared, bias)
        self.o = dense(draw, inner, width, bias=draw.random.random() < 0.5)
        self.scores = draw.pick(
            "scores",
            ("sdpa", "a mask", "written out", "added mask", "window", "ALiBi", "soft cap"),
            (4, 1, 2, 1, 1, 1, 1),
        )
        self.turned = turned
        self.normed = draw.often("normed queries and keys", 0.15)
        if self.normed:
            self.q_norm, self.k_norm = (RMS(self.size, added=False, root=False) for _ in range(2))

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (B, H, T, E)."""
        inner, shared = self.heads * self.size, self.groups * self.size
        if self.layout == "by heads":
            y = self.qkv(x).view(*x.shape[:2], self.heads, 3, self.size)
            q, k, v = (part.transpose(1, 2) for part in y.unbind(3))
            return q, k, v
        if self.layout == "apart":
            parts = self.q(x), self.k(x), self.v(x)
        elif self.layout == "chunks":
            parts = self.qkv(x).chunk(3, -1)
        else:
            parts = self.qkv(x).split([inner, shared, shared], -1)
        q, k, v = (y.view(*y.shape[:2], -1, self.size).transpose(1, 2) for y in parts)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projections(x)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.turned:
            q, k = _rotated(q), _rotated(k)
        if self.groups != self.heads:
            k, v = (y.repeat_interleave(self.heads // self.groups, 1) for y in (k, v))
        if self.scores == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.scores in ("a mask", "window"):
            mask = _causal(x).triu(-3) if self.scores == "window" else _causal(x)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = self.written_out(q, k, x) @ v
        return self.o(y.transpose(1, 2).flatten(2))

    def written_out(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """Probabilities (B, H, T, T)."""
        scores = q @ k.transpose(-2, -1) / self.size**0.5
        if self.scores == "soft cap":
            scores = 5 * torch.tanh(scores / 5)
        if self.scores == "ALiBi":
            slopes = 2.0 ** -torch.arange(1, self.heads + 1, dtype=x.dtype, device=x.device)
            scores = scores - slopes[:, None, None] * _behind(x)
        if self.scores == "added mask":
            lowest = torch.full(scores.shape[-2:], float("-inf"), dtype=x.dtype, device=x.device)
            return (scores + lowest.triu(1)).softmax(-1)
        return scores.masked_fill(~_causal(x), float("-inf")).softmax(-1)
