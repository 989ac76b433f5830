"""Sums, products and multiples of coordinate ranges. Legend: W width of a range. Source: TINT.md
section 2, "Residual", "Activation".
"""

from __future__ import annotations

from torch import Tensor

from tintc.runtime.backends.transformer.modules.norm import Ones
from tintc.runtime.backends.transformer.modules.parts import Layer, NarrowAttention, Range, read


class Residual(Layer):
    """x + y: a residual connection."""

    def forward(self, stream: Tensor, code: Tensor, x: Range, y: Range, z: Range) -> Tensor:
        return self.write(stream, code, z, read(stream, x) + read(stream, y))


class Multiply(Layer):
    """x * y by one-wide heads of a token that attends to itself: a gated unit. size: W."""

    formula = "4*W + d*ceil(W/d) + 4*d"

    def __init__(self, *, size: int, width: int) -> None:
        super().__init__(width)
        self.sizes["W"] = size
        self.ones_of_input, self.attention = Ones(size, width), NarrowAttention(size, itself=True)

    def forward(self, stream: Tensor, code: Tensor, x: Range, y: Range, z: Range) -> Tensor:
        return self.write(
            stream,
            code,
            z,
            self.attention(read(stream, x), read(stream, y), self.ones_of_input(code)),
        )


class Scale(Layer):
    """factor * x: a residual connection that is scaled, and replaces what it reaches."""

    def __init__(self, *, width: int, factor: float) -> None:
        super().__init__(width)
        self.factor = factor

    def forward(self, stream: Tensor, code: Tensor, x: Range, y: Range) -> Tensor:
        return self.write(stream, code, y, read(stream, x) * self.factor)
