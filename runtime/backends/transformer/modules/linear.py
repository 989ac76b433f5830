"""Linear layers by linear attention between input and prefix tokens, one module a tile of the
weight.

Legend: B sequences, T input tokens, K prefix tokens, S rows a token, P heads of columns, d head
width, R rows and C columns of the tile. Row s * K + j of the tile lies in token j (ir/layout.py,
Tile). Each attention over a tile has S P d (S + P + 2) parameters and a gate 4 d. Source: TINT.md
section 3; paper section 2.3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tintc.runtime.backends.transformer.modules.parts import (
    Layer,
    LinearAttention,
    Place,
    Range,
    groups,
    held,
    join,
    mirrored,
    one_hots,
    pattern,
    read,
    regroup,
    repeat_all,
    repeat_each,
    same,
    split,
    stepped,
)


class TileLayer(Layer):
    """rows, columns: R and C. tokens: prefix tokens that the tile has, K. rows_each: S. pieces: P.
    width: d.
    """

    def __init__(
        self,
        *,
        rows: int,
        columns: int,
        tokens: int,
        rows_each: int,
        pieces: int,
        width: int,
        add: bool = False,
        side: str = "inputs",
    ) -> None:
        super().__init__(width, add=add, side=side)
        self.rows, self.columns, self.tokens, self.rows_each, self.pieces = (
            rows,
            columns,
            tokens,
            rows_each,
            pieces,
        )
        self.heads = rows_each * pieces
        self.sizes |= {"S": rows_each, "P": pieces}

    def spread(self) -> Tensor:
        """SplitMap weight, 1 -> S P: one part to all heads."""
        return pattern([[1.0]] * self.heads, self.width)

    def weight_heads(self, page: Tensor, place: Place) -> Tensor:
        """(..., K, 1, S P d): the tile's rows, which lie in whole heads already."""
        return held(page, place).unsqueeze(-2)

    def row_heads(self, y: Tensor) -> Tensor:
        """(B, T, R) -> (B, T, S, d): entry s * K + j of a vector over rows lies at j of head s."""
        return groups(y, self.rows_each, self.tokens, self.width)


class LinearForward(TileLayer):
    """y_t = W x_t. Head (s, h): <piece h of row s of token j, piece h of x_t> times the one-hot of
    j, summed over j; then over h.
    """

    formula = "S*P*d*(S + P + 2) + 4*d"

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        s, p, d = self.rows_each, self.pieces, self.width
        self.attention = LinearAttention(
            s * p,
            repeat_all(p, s, d),
            same(s * p * d),
            self.spread(),
            mirrored(repeat_each(s, p, d)),
        )

    def forward(
        self, stream: Tensor, code: Tensor, page: Tensor, place: Place, x: Range, y: Range
    ) -> Tensor:
        x_BTPd = split(read(stream, x), self.pieces, self.width)
        y_BTSd = self.attention(x_BTPd, self.weight_heads(page, place), self.places(code, place))
        return self.write(stream, code, y, join(y_BTSd, self.tokens, self.rows))


class LinearBackward(TileLayer):
    """dx_t = W^T dy_t. Head (s, h): dy_t at row s of token j, found by the one-hot of j, times
    piece h of that row; then over s.
    """

    formula = LinearForward.formula

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        s, p, d = self.rows_each, self.pieces, self.width
        self.attention = LinearAttention(
            s * p,
            repeat_each(s, p, d),
            self.spread(),
            same(s * p * d),
            mirrored(repeat_all(p, s, d)),
        )

    def forward(
        self, stream: Tensor, code: Tensor, page: Tensor, place: Place, dy: Range, dx: Range
    ) -> Tensor:
        dx_BTPd = self.attention(
            self.row_heads(read(stream, dy)),
            self.places(code, place),
            self.weight_heads(page, place),
        )
        return self.write(stream, code, dx, join(dx_BTPd, self.width, self.columns))


class LinearDescent(TileLayer):
    """W <- W - eta sum_t dy_t x_t^T: prefix tokens attend to input tokens. Head (s, h): the one-hot
    of j finds dy_t at row s of token j, times -eta times piece h of x_t, summed over t and added to
    the rows that the token holds. add: False leaves the sum alone, of a descent from zero."""

    formula = LinearForward.formula

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**{"add": True, **sizes, "side": "prefix"})
        s, p, d = self.rows_each, self.pieces, self.width
        self.attention = LinearAttention(
            s * p, self.spread(), repeat_each(s, p, d), repeat_all(p, s, d), same(s * p * d)
        )

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
        x_BTPd = stepped(split(read(stream, x), self.pieces, self.width), rate)
        change = self.attention(self.places(code, place), self.row_heads(read(stream, dy)), x_BTPd)
        return self.update(page, code, place, change.squeeze(-2))


class BiasForward(TileLayer):
    """y_t += b: the biases of token j's rows lie in one head. Head s picks its s-th bias by an e_s,
    times the one-hot of j.
    """

    formula = "4*S*d + 4*d"

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**{**sizes, "add": True})
        s, d = self.rows_each, self.width
        self.attention = LinearAttention(
            s, one_hots(s, d), self.spread(), self.spread(), same(s * d)
        )

    def forward(self, stream: Tensor, code: Tensor, page: Tensor, place: Place, y: Range) -> Tensor:
        biases = split(held(page, place), 1, self.width)
        y_1Sd = self.attention(self.ones(code), biases, self.places(code, place))
        return self.write(
            stream, code, y, join(regroup(y_1Sd, self.rows_each), self.tokens, self.rows)
        )


class BiasDescent(TileLayer):
    """b <- b - eta sum_t dy_t: head s finds dy_t at row s of token j by the one-hot of j, times
    -eta e_s.
    """

    formula = BiasForward.formula

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**{"add": True, **sizes, "side": "prefix"})
        s, d = self.rows_each, self.width
        self.attention = LinearAttention(
            s, self.spread(), same(s * d), one_hots(s, d), mirrored(self.spread())
        )

    def forward(
        self, page: Tensor, code: Tensor, stream: Tensor, place: Place, dy: Range, rate: Tensor
    ) -> Tensor:
        dy_BTSd = self.row_heads(read(stream, dy))
        ones_BT1d = self.ones(code).expand(*dy_BTSd.shape[:-2], 1, self.width)
        change = self.attention(self.places(code, place), dy_BTSd, stepped(ones_BT1d, rate))
        return self.update(page, code, place, join(change, self.rows_each, self.rows_each))


class VectorForward(Layer):
    """y_t += b, where one prefix token holds the whole vector: its one-hot is found by ones. size:
    W. add: False replaces y.
    pieces: y has that many, and each gets the vector, of E = W / pieces numbers."""

    formula = "2*d + E + W + 4*d"

    def __init__(self, *, size: int, width: int, pieces: int = 1, add: bool = True) -> None:
        super().__init__(width, add=add)
        self.sizes |= {"W": size, "E": size // pieces}
        spread = repeat_all(1, pieces, size // pieces)
        self.attention = LinearAttention(1, same(width), same(width), same(size // pieces), spread)

    def forward(self, stream: Tensor, code: Tensor, page: Tensor, place: Place, y: Range) -> Tensor:
        value = self.attention(
            self.ones(code), self.places(code, place), held(page, place).unsqueeze(-2)
        )
        return self.write(stream, code, y, value.flatten(-2))


class VectorDescent(Layer):
    """b <- b - eta sum_t dy_t, where one prefix token holds the whole vector; the pieces of dy that
    share it add up. size: W.
    """

    formula = VectorForward.formula

    def __init__(self, *, size: int, width: int, pieces: int = 1, add: bool = True) -> None:
        super().__init__(width, add=add, side="prefix")
        self.sizes |= {"W": size, "E": size // pieces}
        gather = mirrored(repeat_all(1, pieces, size // pieces))
        self.attention = LinearAttention(1, same(width), same(width), gather, same(size // pieces))

    def forward(
        self, page: Tensor, code: Tensor, stream: Tensor, place: Place, dy: Range, rate: Tensor
    ) -> Tensor:
        dy_BT1W = stepped(read(stream, dy).unsqueeze(-2), rate)
        ones_BT1d = self.ones(code).expand(*dy_BT1W.shape[:-1], self.width)
        change = self.attention(self.places(code, place), ones_BT1d, dy_BT1W)
        return self.update(page, code, place, change.squeeze(-2))
