"""Models that look like what passes know and are something else: computed right or refused, never
computed wrong.

Each is compiled as far as its canonical graph and, if it is not refused, run at lengths far apart
and in batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import randomized
from tests.support.spelled import (
    NEGATIVE,
    SDPA,
    agree_or_refuse,
    angles,
    back,
    causal,
    counted,
    masked,
    merged,
    projections,
    rotated,
    turned,
    written,
)
from tests.support.toys import Middle, Toy, toy


class More(Toy):
    """With gains of a head, of all heads, and of one number."""

    def __init__(self, middle: Middle) -> None:
        super().__init__(middle)
        self.gain_E, self.gain_HE, self.gain_1 = (
            nn.Parameter(torch.ones(size)) for size in (3, (2, 3), 1)
        )


def more(middle: Callable[[More, Tensor, Tensor], Tensor]) -> More:
    model: More = randomized(More(middle)).double()  # type: ignore[arg-type]
    return model


def length(x: Tensor) -> Tensor:
    return torch.full((), x.shape[1], dtype=torch.float64)


def growing(x: Tensor) -> Tensor:
    """1 up to 20 tokens, then more: as attentions that scale their queries by the logarithm of the
    length.
    """
    return (length(x).log() / math.log(20)).clamp(min=1)


def first(x: Tensor) -> Tensor:
    """(B, 1, 1, 1), true for the first sequence."""
    return torch.arange(x.shape[0])[:, None, None, None] == 0


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


def on_queries(change: Callable[[More, Tensor], Tensor]) -> More:
    def middle(m: More, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = projections(m, x)
        return merged(SDPA(change(m, q), change(m, k), v, is_causal=True))

    return more(middle)


BY_LENGTH = {
    "a window of half the length": masked(lambda x: causal(x) & (back(x) <= x.shape[1] // 2)),
    "a bias that shrinks with the length": masked(
        lambda x: torch.where(causal(x), 3.0 * counted(x) / x.shape[1], NEGATIVE).double()
    ),
    "positions from 0 to 1": toy(
        lambda m, x, ids: x + (counted(x) / x.shape[1])[:, None].expand(-1, 6)
    ),
    "queries scaled by the length": turned(lambda q, x: q / length(x).sqrt()),
    "queries scaled from some length on": turned(lambda q, x: q * growing(x)),
    "scores scaled from some length on": written(
        lambda s, x: (s * growing(x)).masked_fill(~causal(x), NEGATIVE)
    ),
    "activations scaled from some length on": toy(lambda m, x, ids: m.linear(x) * growing(x)),
    "interpolated rotation": turned(
        lambda q, x: rotated(q, *angles(x, positions=counted(x) * (20 / length(x).clamp(min=20))))
    ),
    "rotation of another base": turned(
        lambda q, x: rotated(q, *angles(x, base=length(x).clamp(min=20)))
    ),
    "one of two rotations": turned(
        lambda q, x: rotated(
            q,
            *(
                torch.where(length(x) > 40, a, b)
                for a, b in zip(angles(x), angles(x, base=9.0), strict=True)
            ),
        )
    ),
    "tokens clamped at the 8th": toy(lambda m, x, ids: m.linear(x[:, counted(x).clamp(max=8)])),
    "tokens rolled by a sixth": toy(lambda m, x, ids: m.linear(x.roll(x.shape[1] // 6, 1))),
    "keys clamped at the 8th": turned(
        lambda q, x: q, lambda k, x: k[:, :, counted(x).clamp(max=8)]
    ),
    "results clamped at the 8th": more(
        lambda m, x, ids: (
            lambda q, k, v: merged(SDPA(q, k, v, is_causal=True)[:, :, counted(x).clamp(max=8)])
        )(*projections(m, x))
    ),
    "learned positions clamped": toy(
        lambda m, x, ids: x + m.positions.weight[counted(x).clamp(max=8)]
    ),
    "learned positions wrapped": toy(lambda m, x, ids: x + m.positions.weight[counted(x) % 8]),
}

BY_BATCH = {
    "mask": masked(lambda x: causal(x) & (first(x) | (back(x) < 3))),
    "rotation": turned(
        lambda q, x: rotated(
            q, *(table + torch.arange(x.shape[0])[:, None, None, None] for table in angles(x))
        )
    ),
    "positions": toy(
        lambda m, x, ids: x + torch.arange(x.shape[0])[:, None, None] * torch.ones(x.shape[1], 6)
    ),
    "bias": masked(
        lambda x: torch.where(
            causal(x), counted(x) * 0.1 * torch.arange(x.shape[0])[:, None, None, None], NEGATIVE
        ).double()
    ),
}

NEARLY = {
    "positions behind a relu": toy(lambda m, x, ids: x + F.relu(m.positions.weight[: x.shape[1]])),
    "positions plus the width": toy(lambda m, x, ids: x + (m.positions.weight[: x.shape[1]] + 6)),
    "positions twice": toy(
        lambda m, x, ids: torch.add(x, m.positions.weight[: x.shape[1]], alpha=2)
    ),
    "positions of one weight": toy(lambda m, x, ids: x + m.positions.weight[: x.shape[1]].abs()),
    "positions moved by tokens": toy(
        lambda m, x, ids: x + m.positions.weight[(ids % 2 + counted(x)).clamp(max=11)]
    ),
    "noise": toy(lambda m, x, ids: x + torch.rand(x.shape[1], 6)),
    "a bias twice": toy(lambda m, x, ids: m.linear(x) + m.linear.bias),
    "twice a bias": toy(
        lambda m, x, ids: torch.add(x @ m.linear.weight.t(), m.linear.bias, alpha=2)
    ),
    "thrice a shift": toy(
        lambda m, x, ids: torch.add(rms(x) * m.norm.weight, m.norm.bias, alpha=3)
    ),
    "thrice an epsilon": toy(
        lambda m, x, ids: (
            x * torch.rsqrt(torch.add((x * x).mean(-1, keepdim=True), 0.1, alpha=3)) * m.scale
        )
    ),
    "a gain plus three": toy(lambda m, x, ids: rms(x) * torch.add(m.scale, 1.0, alpha=3)),
    "one minus a gain": toy(lambda m, x, ids: rms(x) * (1 - m.scale)),
    "a gain twice": toy(lambda m, x, ids: m.linear(x * m.scale) * m.scale),
    "a clamp beyond 9": toy(lambda m, x, ids: (m.linear(x) * 100).clamp(-10, 10)),
    "a clamped relu": toy(lambda m, x, ids: F.relu(m.linear(x) * 100).clamp(max=20.0)),
    "a hard tanh": toy(lambda m, x, ids: F.hardtanh(m.linear(x) * 100, -11, 11)),
    "a silu until 12": toy(lambda m, x, ids: F.silu((m.linear(x) * 100).clamp(max=12.0))),
    "nearly a quick gelu": toy(lambda m, x, ids: x * torch.sigmoid(1.7 * x)),
    "nearly a gelu": toy(
        lambda m, x, ids: 0.5 * x * (1 + torch.tanh(0.7979 * (x + 0.044715 * x**3)))
    ),
    "a sharp softplus": toy(lambda m, x, ids: F.softplus(m.linear(x), beta=30)),
    "a square": toy(lambda m, x, ids: m.linear(x) * m.linear(x)),
    "a residual silu": toy(lambda m, x, ids: x + F.silu(x)),
    "a residual relu": toy(lambda m, x, ids: x + F.relu(-x)),
    "silu of itself gated by itself": toy(lambda m, x, ids: x * F.silu(x)),
    "a gate of two roots": toy(lambda m, x, ids: F.silu(m.linear(x)) * m.norm(x)),
    "every other column": toy(lambda m, x, ids: F.silu(m.wide(x)[..., ::3]) * m.wide(x)[..., 1::3]),
    "columns that overlap": toy(lambda m, x, ids: m.wide(x)[..., 0:6] * m.wide(x)[..., 3:9]),
    "columns out of order": toy(lambda m, x, ids: m.linear(x)[..., [1, 0, 2, 3, 4, 5]]),
    "a multiple of the fill": written(lambda s, x: s.masked_fill(~causal(x), -1e4) * 1e-3),
    "minus the fill": written(lambda s, x: s.masked_fill(~causal(x), -1e9) * -1),
    "a bias of one axis": written(
        lambda s, x: s.masked_fill(~causal(x), NEGATIVE) + 0.3 * counted(x)
    ),
    "ALiBi and a small bias": masked(
        lambda x: torch.where(causal(x), 0.01 * (back(x) % 2) - 0.5 * back(x), NEGATIVE).double()
    ),
    "queries rounded down": turned(lambda q, x: torch.div(q * 30, 2, rounding_mode="floor")),
    "gains for each head": on_queries(
        lambda m, q: (rms(q.transpose(1, 2)) * m.gain_HE).transpose(1, 2)
    ),
    "a gain of heads twice": on_queries(lambda m, q: rms(q) * m.gain_E * m.gain_E),
    "a norm over part of a head": on_queries(
        lambda m, q: torch.cat([rms(q[..., :2]), q[..., 2:]], -1)
    ),
    "a norm over tokens": on_queries(
        lambda m, q: q * torch.rsqrt(q.pow(2).mean(-2, keepdim=True) + 1e-3)
    ),
    "a learned temperature": on_queries(lambda m, q: q * m.gain_1),
    "normed values": more(
        lambda m, x, ids: (lambda q, k, v: merged(SDPA(q, k, rms(v) * m.gain_E, is_causal=True)))(
            *projections(m, x)
        )
    ),
    "keys and values change places": more(
        lambda m, x, ids: (lambda q, k, v: merged(SDPA(k, q, v, is_causal=True)))(
            *projections(m, x)
        )
    ),
    "a norm of other numbers": toy(
        lambda m, x, ids: m.linear(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
    ),
    "only centred": toy(
        lambda m, x, ids: (
            (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        )
    ),
    "the variance without centring": toy(
        lambda m, x, ids: x * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-3)
    ),
    "an unbiased variance": toy(
        lambda m, x, ids: (
            (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-3)
        )
    ),
    "a norm of fourth powers": toy(
        lambda m, x, ids: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-3)
    ),
    "epsilon outside of the root": toy(
        lambda m, x, ids: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-3)
    ),
    "a multiple normed": toy(lambda m, x, ids: rms(3 * x) * m.scale),
}

MODELS = {**BY_LENGTH, **{f"batch: {name}": model for name, model in BY_BATCH.items()}, **NEARLY}


@pytest.mark.parametrize("name", MODELS)
def test_never_misread(name: str) -> None:
    assert agree_or_refuse(MODELS[name])


@pytest.mark.parametrize(
    "condition",
    [
        "t <= 150",
        "2 * t <= 300",
        "t + 50 <= 200",
        "t // 2 <= 60",
        "t % 160 != 0",
        "t <= 150 or t > 400",
    ],
)
def test_branches_are_limits(condition: str) -> None:
    """A model's graph stands for the lengths that take the branch it was captured along."""
    assert agree_or_refuse(
        toy(lambda m, x, ids: m.linear(x) if eval(condition, {"t": x.shape[1]}) else x),
        (2, 130, 149, 150, 151, 159, 170),
    )
