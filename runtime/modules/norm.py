"""Norms: layer normalization of a coordinate range, and linear attention that multiplies by gains and adds shifts.

Legend: B sequences, T input tokens, W the norm's width, d head width. f(x) = (x - mean) / sqrt(eps + var), or
x / sqrt(eps + mean(x^2)). A gain lies whole in one prefix token; W heads of one coordinate multiply by it, where the paper's code
holds a diagonal matrix. Differences run in float64, so that they are right in every dtype. Source: TINT.md sections 2 and 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintc.runtime.modules.parts import (
    Layer,
    NarrowAttention,
    Place,
    Range,
    SelfAttention,
    SplitMap,
    held,
    join,
    pattern,
    read,
)

_GAIN = "4*W + d*ceil(W/d)"  # one-wide heads and the ones that they need


def normalized(x: Tensor, eps: float, kind: str) -> Tensor:
    """f(x) over the last dimension."""
    normalize = F.layer_norm if kind == "layer" else F.rms_norm
    return normalize(x, (x.shape[-1],), eps=eps)


class Ones(nn.Module):
    """W ones in a token, from the d ones of its position code: ceil(W / d) * d parameters."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.spread = SplitMap(pattern([[1.0]] * math.ceil(size / width), width))

    def forward(self, code: Tensor) -> Tensor:
        """(1, W)."""
        return join(self.spread(code[-1:, None, self.width :]), self.width, self.size)


class Gain(nn.Module):
    """gamma * x, by one-wide heads that attend to the token which holds gamma."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.ones, self.attention = Ones(size, width), NarrowAttention(size)

    def forward(self, x: Tensor, page: Tensor, code: Tensor, place: Place) -> Tensor:
        found: Tensor = self.attention(x, held(page, place), self.ones(code))
        return found


class NormForward(Layer):
    """f(x), or gamma * f(x); the shift is a VectorForward behind it. size: W."""

    def __init__(self, *, size: int, width: int, eps: float, kind: str, gain: bool) -> None:
        super().__init__(width)
        self.formula, self.sizes["W"] = f"{_GAIN} + 4*d" if gain else "4*d", size
        self.eps, self.kind = eps, kind
        self.gain = Gain(size, width) if gain else None

    def forward(self, stream: Tensor, code: Tensor, page: Tensor | None, place: Place | None, x: Range, y: Range) -> Tensor:
        value = normalized(read(stream, x), self.eps, self.kind)
        if self.gain is not None:
            value = self.gain(value, page, code, place)
        return self.write(stream, code, y, value)


class Difference(nn.Module):
    """N (f(x + g / N) - f(x)): a split map to both arguments, f on both, a split map to the difference. 6 W parameters."""

    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.arguments = SplitMap(pattern([[1.0, 1.0], [1.0, 0.0]], size))
        self.result = SplitMap(pattern([[1.0, -1.0]], size))

    def arguments_of(self, x: Tensor, g: Tensor) -> Tensor:
        """(..., 2, W): x + g / N and x."""
        found: Tensor = self.arguments(torch.stack([x, g / self.scale], -2))
        return found

    def of(self, values: Tensor) -> Tensor:
        """(..., W) from f of both arguments."""
        found: Tensor = self.result(values).squeeze(-2) * self.scale
        return found


class NormBackward(Layer):
    """dx from g = gamma * dy, first order: N (f(x + g/N) - f(x)), N = scale. size: W."""

    def __init__(self, *, size: int, width: int, eps: float, kind: str, gain: bool, scale: float) -> None:
        super().__init__(width)
        self.formula, self.sizes["W"] = "10*W + d*ceil(W/d) + 4*d" if gain else "6*W + 4*d", size
        self.eps, self.kind = eps, kind
        self.gain = Gain(size, width) if gain else None
        self.difference = Difference(size, scale)

    def forward(self, stream: Tensor, code: Tensor, page: Tensor | None, place: Place | None, dy: Range, x: Range, dx: Range) -> Tensor:
        g = read(stream, dy)
        if self.gain is not None:
            g = self.gain(g, page, code, place)
        both = self.difference.arguments_of(read(stream, x).double(), g.double())
        found = self.difference.of(normalized(both, self.eps, self.kind))
        return self.write(stream, code, dx, found.to(stream.dtype))


class NormBackwardExact(Layer):
    """dx = (g - mean(g) - f mean(g f)) / s with g = gamma * dy and s = sqrt(eps + var); an RMS norm has no mean(g).

    Means are a token's linear attention to itself, the other products one-wide heads. size: W.
    """

    def __init__(self, *, size: int, width: int, eps: float, kind: str, gain: bool) -> None:
        super().__init__(width)
        maps = 4 * (4 + 2 * (kind == "layer") + gain)  # of each attention, four
        self.formula, self.sizes["W"] = f"{maps}*W + {1 + gain}*d*ceil(W/d) + 4*d", size
        self.eps = eps
        self.gain = Gain(size, width) if gain else None
        self.range_of_ones = Ones(size, width)
        self.mean_x = SelfAttention(size) if kind == "layer" else None
        self.mean_g = SelfAttention(size) if kind == "layer" else None
        self.variance, self.inner = SelfAttention(size), SelfAttention(size)
        self.normalize, self.shrink = NarrowAttention(size, itself=True), NarrowAttention(size, itself=True)

    def forward(self, stream: Tensor, code: Tensor, page: Tensor | None, place: Place | None, dy: Range, x: Range, dx: Range) -> Tensor:
        g, c = read(stream, dy), read(stream, x).double()
        if self.gain is not None:
            g = self.gain(g, page, code, place)
        g, ones = g.double(), self.range_of_ones(code).double()
        if self.mean_x is not None and self.mean_g is not None:
            c, g = c - self.mean_x(c, ones, ones), g - self.mean_g(g, ones, ones)
        inverse = torch.rsqrt(self.variance(c, c, ones) + self.eps)
        f = self.normalize(c, inverse, ones)
        found = self.shrink(g - self.inner(g, f, f), inverse, ones)
        return self.write(stream, code, dx, found.to(stream.dtype))


class NormDescent(Layer):
    """gamma <- gamma - eta sum_t dy_t * f(x_t): the token that holds gamma attends to the input tokens by one-wide heads. size: W."""

    formula = f"{_GAIN} + 4*d"

    def __init__(self, *, size: int, width: int, eps: float, kind: str) -> None:
        super().__init__(width, add=True, side="prefix")
        self.sizes["W"] = size
        self.eps, self.kind = eps, kind
        self.ones_of_prefix, self.attention = Ones(size, width), NarrowAttention(size)

    def forward(self, page: Tensor, code: Tensor, stream: Tensor, place: Place, dy: Range, x: Range, inner_lr: Tensor) -> Tensor:
        f = normalized(read(stream, x), self.eps, self.kind)
        change = self.attention(self.ones_of_prefix(code), read(stream, dy), f * -inner_lr)
        return self.update(page, code, place, change)
