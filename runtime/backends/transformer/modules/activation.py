"""Elementwise activations of a coordinate range, and their backward pass between two split maps.

Legend: B sequences, T input tokens, W width. Differences run in float64. Source: TINT.md sections 2
and 3; paper section 2.4.
"""

from __future__ import annotations

from torch import Tensor

from tintc.ir.ops.activation import RELUS, SMOOTH, activation_forward, relu_slope
from tintc.runtime.backends.transformer.modules.norm import Difference, Ones
from tintc.runtime.backends.transformer.modules.parts import Layer, NarrowAttention, Range, read


def slope_of(x: Tensor, kind: str) -> Tensor:
    """a'(x)."""
    return relu_slope(x, kind).to(x.dtype) if kind in RELUS else SMOOTH[kind].derivatives(x)[0]


class ActivationForward(Layer):
    """y = a(x)."""

    def __init__(self, *, width: int, kind: str) -> None:
        super().__init__(width)
        self.kind = kind

    def forward(self, stream: Tensor, code: Tensor, x: Range, y: Range) -> Tensor:
        return self.write(stream, code, y, activation_forward(read(stream, x), self.kind))


class ActivationBackward(Layer):
    """dx = N (a(x + dy/N) - a(x)), N = scale. size: W."""

    formula = "6*W + 4*d"

    def __init__(self, *, size: int, width: int, kind: str, scale: float) -> None:
        super().__init__(width)
        self.sizes["W"] = size
        self.kind = kind
        self.difference = Difference(size, scale)

    def forward(self, stream: Tensor, code: Tensor, dy: Range, x: Range, dx: Range) -> Tensor:
        both = self.difference.arguments_of(read(stream, x).double(), read(stream, dy).double())
        found = self.difference.of(activation_forward(both, self.kind))
        return self.write(stream, code, dx, found.to(stream.dtype))


class ActivationBackwardExact(Layer):
    """dx = a'(x) * dy, the product by one-wide heads of a token that attends to itself. size: W."""

    formula = "4*W + d*ceil(W/d) + 4*d"

    def __init__(self, *, size: int, width: int, kind: str) -> None:
        super().__init__(width)
        self.sizes["W"] = size
        self.kind = kind
        self.ones_of_input, self.attention = Ones(size, width), NarrowAttention(size, itself=True)

    def forward(self, stream: Tensor, code: Tensor, dy: Range, x: Range, dx: Range) -> Tensor:
        slope = slope_of(read(stream, x), self.kind)
        return self.write(
            stream, code, dx, self.attention(read(stream, dy), slope, self.ones_of_input(code))
        )
