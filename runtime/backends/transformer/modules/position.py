"""Rotary positions: each coordinate of a head turns with its partner, by a token's linear attention
to two views of itself.

Legend: B sequences, T input tokens, H heads, E head width of the auxiliary model, R coordinates of
a head that turn (R <= E), W = H R, d head width. Source: TINT.md section 2, "Self-attention";
RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tintc.runtime.backends.transformer.modules.norm import Ones
from tintc.runtime.backends.transformer.modules.parts import (
    Layer,
    NarrowAttention,
    Range,
    SplitMap,
    pattern,
    read,
)


class Partner(nn.Module):
    """x_p(e) at e in every head: a split map that exchanges two parts, the halves of R or its even
    and odd coordinates.

    2 R parameters, which all heads share.
    """

    def __init__(self, turned: int, pairing: str) -> None:
        super().__init__()
        self.exchange = SplitMap(pattern([[0.0, 1.0], [1.0, 0.0]], turned // 2))
        self.pairing = pairing

    def forward(self, x: Tensor) -> Tensor:
        """(..., R) -> (..., R)."""
        if self.pairing == "half":
            return self.exchange.whole(x)
        pairs = torch.unflatten(x, -1, (-1, 2)).mT
        found: Tensor = self.exchange(pairs).mT.flatten(-2)
        return found


class Rotary(Layer):
    """y_e = cos_e x_e + sin_e x_p(e) in every head, and y_e = x_e behind the first R; transposed,
    sin_p(e) stands for sin_e.

    One-wide heads with the keys x and P x and the values cos and sin (transposed: P sin), which
    serve all heads. size: W. turned: R.
    """

    formula = "4*W + 2*R + d*ceil(R/d) + 4*d"

    def __init__(
        self, *, heads: int, turned: int, width: int, pairing: str, transpose: bool
    ) -> None:
        super().__init__(width)
        self.sizes |= {"W": heads * turned, "R": turned}
        self.heads, self.turned, self.transpose = heads, turned, transpose
        self.partner, self.ones_of_input = Partner(turned, pairing), Ones(turned, width)
        self.attention = NarrowAttention(heads * turned, pieces=heads, once=("query", "value"))

    def forward(
        self, stream: Tensor, code: Tensor, x: Range, cos: Range, sin: Range, y: Range
    ) -> Tensor:
        x_BTHE = torch.unflatten(read(stream, x), -1, (self.heads, -1))
        first_BTHR, rest = x_BTHE[..., : self.turned], x_BTHE[..., self.turned :]
        sin_BTR = read(stream, sin)
        if self.transpose:
            sin_BTR = self.partner(sin_BTR)
        keys_BT2W = torch.stack([first_BTHR.flatten(-2), self.partner(first_BTHR).flatten(-2)], -2)
        values_BT2R = torch.stack([read(stream, cos), sin_BTR], -2)
        found = self.attention(self.ones_of_input(code), keys_BT2W, values_BT2R)
        y_BTHR = torch.unflatten(found.squeeze(-2), -1, (self.heads, -1))
        return self.write(stream, code, y, torch.cat([y_BTHR, rest], -1).flatten(-2))
