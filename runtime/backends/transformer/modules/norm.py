"""Norms: layer normalization of a coordinate range, and linear attention that multiplies by gains
and adds shifts.

Legend: B sequences, T input tokens, W width of the range, in pieces of E coordinates that are
normalised one by one (of q and k, a piece is a head; else there is one), d head width. f(x) = (x -
mean) / sqrt(eps + var), x / sqrt(eps + mean(x^2)), or x itself where all there is is a gain. A gain
of E numbers lies whole in one prefix token; W heads of one coordinate multiply by it, where the
paper's code holds a diagonal matrix. Differences run in float64, so that they are right in every
dtype. Source: TINT.md sections 2 and 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintc.runtime.backends.transformer.modules.parts import (
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
    stepped,
)

_GAIN = "4*W + d*ceil(E/d)"  # one-wide heads and the ones that they need


def normalized(x: Tensor, eps: float, kind: str, pieces: int) -> Tensor:
    """f(x) over each piece of the last dimension."""
    if kind == "scale":
        return x
    normalize = F.layer_norm if kind == "layer" else F.rms_norm
    cut = torch.unflatten(x, -1, (pieces, -1))
    return normalize(cut, (cut.shape[-1],), eps=eps).flatten(-2)


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
    """(gamma + offset) * x, by one-wide heads that attend to the token which holds gamma, and a
    residual connection of `offset` x.
    """

    def __init__(self, size: int, width: int, pieces: int, offset: float) -> None:
        super().__init__()
        self.ones = Ones(size // pieces, width)
        self.attention = NarrowAttention(size, pieces=pieces, once=("key", "value"))
        self.offset = offset

    def forward(self, x: Tensor, page: Tensor, code: Tensor, place: Place) -> Tensor:
        found: Tensor = self.attention(x, held(page, place), self.ones(code))
        return found + self.offset * x if self.offset else found


class NormLayer(Layer):
    """size: W. pieces: W / E. gain, offset: whether gamma is there, and what is added to it."""

    def __init__(
        self,
        *,
        size: int,
        width: int,
        eps: float,
        kind: str,
        gain: bool,
        pieces: int = 1,
        offset: float = 0.0,
    ) -> None:
        super().__init__(width)
        self.sizes |= {"W": size, "E": size // pieces}
        self.eps, self.kind, self.pieces = eps, kind, pieces
        self.gain = Gain(size, width, pieces, offset) if gain else None

    def gained(self, x: Tensor, page: Tensor | None, code: Tensor, place: Place | None) -> Tensor:
        """(gamma + offset) * x."""
        return x if self.gain is None else self.gain(x, page, code, place)

    def of(self, x: Tensor) -> Tensor:
        """f(x)."""
        return normalized(x, self.eps, self.kind, self.pieces)


class NormForward(NormLayer):
    """f(x), or gamma * f(x); the shift is a VectorForward behind it. A learned scale alone is its
    own backward pass.
    """

    def __init__(self, *, gain: bool, **sizes: Any) -> None:
        super().__init__(gain=gain, **sizes)
        self.formula = f"{_GAIN} + 4*d" if gain else "4*d"

    def forward(
        self,
        stream: Tensor,
        code: Tensor,
        page: Tensor | None,
        place: Place | None,
        x: Range,
        y: Range,
    ) -> Tensor:
        return self.write(stream, code, y, self.gained(self.of(read(stream, x)), page, code, place))


class Difference(nn.Module):
    """N (f(x + g / N) - f(x)): a split map to both arguments, f on both, a split map to the
    difference. 6 W parameters.
    """

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


class NormBackward(NormLayer):
    """dx from g = gamma * dy, first order: N (f(x + g/N) - f(x)), N = scale."""

    def __init__(self, *, size: int, gain: bool, scale: float, **sizes: Any) -> None:
        super().__init__(size=size, gain=gain, **sizes)
        self.formula = f"6*W + {_GAIN} + 4*d" if gain else "6*W + 4*d"
        self.difference = Difference(size, scale)

    def forward(
        self,
        stream: Tensor,
        code: Tensor,
        page: Tensor | None,
        place: Place | None,
        dy: Range,
        x: Range,
        dx: Range,
    ) -> Tensor:
        g = self.gained(read(stream, dy), page, code, place)
        both = self.difference.arguments_of(read(stream, x).double(), g.double())
        return self.write(stream, code, dx, self.difference.of(self.of(both)).to(stream.dtype))


class NormBackwardExact(NormLayer):
    """dx = (g - mean(g) - f mean(g f)) / s with g = gamma * dy and s = sqrt(eps + var); an RMS norm
    has no mean(g).

    Means are a token's linear attention to itself, the other products one-wide heads.
    """

    def __init__(
        self, *, size: int, width: int, kind: str, gain: bool, pieces: int = 1, **more: Any
    ) -> None:
        super().__init__(size=size, width=width, kind=kind, gain=gain, pieces=pieces, **more)
        maps = 4 * (4 + 2 * (kind == "layer"))  # of each attention, four
        self.formula = (
            f"{maps}*W + d*ceil(W/d) + {_GAIN} + 4*d" if gain else f"{maps}*W + d*ceil(W/d) + 4*d"
        )
        self.range_of_ones = Ones(size, width)
        self.mean_x = SelfAttention(size, pieces) if kind == "layer" else None
        self.mean_g = SelfAttention(size, pieces) if kind == "layer" else None
        self.variance, self.inner = SelfAttention(size, pieces), SelfAttention(size, pieces)
        self.normalize, self.shrink = (
            NarrowAttention(size, itself=True),
            NarrowAttention(size, itself=True),
        )

    def forward(
        self,
        stream: Tensor,
        code: Tensor,
        page: Tensor | None,
        place: Place | None,
        dy: Range,
        x: Range,
        dx: Range,
    ) -> Tensor:
        g, c = self.gained(read(stream, dy), page, code, place).double(), read(stream, x).double()
        ones = self.range_of_ones(code).double()
        if self.mean_x is not None and self.mean_g is not None:
            c, g = c - self.mean_x(c, ones, ones), g - self.mean_g(g, ones, ones)
        inverse = torch.rsqrt(self.variance(c, c, ones) + self.eps)
        f = self.normalize(c, inverse, ones)
        found = self.shrink(g - self.inner(g, f, f), inverse, ones)
        return self.write(stream, code, dx, found.to(stream.dtype))


class NormDescent(Layer):
    """gamma <- gamma - eta sum_t dy_t * f(x_t): the token that holds gamma attends to the input
    tokens by one-wide heads, and the pieces that share it add up. size: W. pieces: W / E."""

    formula = f"{_GAIN} + 4*d"

    def __init__(
        self,
        *,
        size: int,
        width: int,
        eps: float,
        kind: str,
        pieces: int = 1,
        add: bool = True,
    ) -> None:
        super().__init__(width, add=add, side="prefix")
        self.sizes |= {"W": size, "E": size // pieces}
        self.eps, self.kind, self.pieces = eps, kind, pieces
        self.ones_of_prefix = Ones(size // pieces, width)
        self.attention = NarrowAttention(size, pieces=pieces, once=("query", "output"))

    def forward(
        self,
        page: Tensor,
        code: Tensor,
        stream: Tensor,
        place: Place,
        dy: Range,
        x: Range,
        rate: Tensor,
    ) -> Tensor:
        f = normalized(read(stream, x), self.eps, self.kind, self.pieces)
        change = self.attention(self.ones_of_prefix(code), read(stream, dy), stepped(f, rate))
        return self.update(page, code, place, change)
