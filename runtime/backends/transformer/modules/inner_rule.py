"""Inner rules: what a weight's pages and those of its states do to each other, and the numbers that
steps are multiplied by.

A state, a gradient and the original numbers lie on pages of their own in the places that the weight
has on its page, so a token's coordinates meet those of the same token alone. A number of each
sequence, (B,), is computed from pages, from tokens or from other numbers.

Legend: B sequences, T input tokens, W coordinates of a tile's tokens, d head width; padding is 0 in
every page. Source: TINT.md section 7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tintc.ir.ops.rates import along, root
from tintc.ir.precision import wide
from tintc.runtime.backends.transformer.modules.norm import Ones
from tintc.runtime.backends.transformer.modules.parts import (
    Counted,
    Layer,
    LinearAttention,
    NarrowAttention,
    Place,
    Range,
    SplitMap,
    held,
    pattern,
    read,
    same,
)

_PRODUCT = "4*W + d*ceil(W/d)"  # one-wide heads and the ones that they need
_PAGE = 2  # dimensions of a page behind that of sequences


class Product(nn.Module):
    """x * y by one-wide heads of a token that attends to itself."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.ones, self.attention = Ones(size, width), NarrowAttention(size, itself=True)

    def forward(self, x: Tensor, y: Tensor, code: Tensor) -> Tensor:
        found: Tensor = self.attention(x, y, self.ones(code).to(x.dtype))
        return found


class InnerProduct(nn.Module):
    """<x, y>, one number a sequence: one-wide heads multiply, and one with a key of ones sums over
    coordinates and tokens.
    """

    formula = f"{_PRODUCT} + W"

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.product, self.sum = Product(size, width), SplitMap(same(size))

    def forward(self, x: Tensor, y: Tensor, code: Tensor) -> Tensor:
        return self.sum.whole(self.product(x, y, code)).sum((-2, -1))


class PageLayer(Layer):
    """On the prefix side: forward(page, code, stream, place, ...) rewrites `place`, and reads the
    same place of the other pages. size: W.
    """

    def __init__(self, *, width: int, add: bool = False) -> None:
        super().__init__(width, add=add, side="prefix")


class Faded(PageLayer):
    """factor * v: a residual connection that is scaled. With factor 1, a copy."""

    def __init__(self, *, width: int, factor: float) -> None:
        super().__init__(width=width)
        self.factor = factor

    def forward(
        self, page: Tensor, code: Tensor, stream: Tensor, place: Place, source: Tensor
    ) -> Tensor:
        return self.update(page, code, place, held(source, place) * self.factor)


class Descended(PageLayer):
    """W - rate v: a residual connection that is scaled."""

    def __init__(self, *, width: int) -> None:
        super().__init__(width=width, add=True)

    def forward(
        self,
        page: Tensor,
        code: Tensor,
        stream: Tensor,
        place: Place,
        direction: Tensor,
        rate: Tensor,
    ) -> Tensor:
        v = held(direction, place)
        return self.update(page, code, place, v * -along(rate, v, _PAGE))


class Toward(PageLayer):
    """W + share * each * (W_0 - W); each: one number a sequence, or nothing, which is 1."""

    formula = "2*W + 4*d"

    def __init__(self, *, size: int, width: int, share: float) -> None:
        super().__init__(width=width, add=True)
        self.sizes["W"] = size
        self.share = share
        self.back = SplitMap(pattern([[1.0, -1.0]], size))

    def forward(
        self,
        page: Tensor,
        code: Tensor,
        stream: Tensor,
        place: Place,
        original: Tensor,
        each: Tensor | None,
    ) -> Tensor:
        back = _difference(self.back, held(original, place), held(page, place))
        share = self.share if each is None else along(each, back, _PAGE) * self.share
        return self.update(page, code, place, back * share)


class Moment(PageLayer):
    """beta m + (1 - beta) g, or of g * g."""

    def __init__(self, *, size: int, width: int, beta: float, squared: bool) -> None:
        super().__init__(width=width)
        self.beta = beta
        self.square = Product(size, width) if squared else None
        if squared:
            self.formula, self.sizes["W"] = f"{_PRODUCT} + 4*d", size

    def forward(
        self,
        page: Tensor,
        code: Tensor,
        stream: Tensor,
        place: Place,
        before: Tensor,
        gradient: Tensor,
    ) -> Tensor:
        g = held(gradient, place)
        seen = g if self.square is None else self.square(g, g, code)
        return self.update(
            page, code, place, held(before, place) * self.beta + seen * (1 - self.beta)
        )


class Quotient(PageLayer):
    """g / (RMS + eps): a product with an activation, 1 / x."""

    formula = f"{_PRODUCT} + 4*d"

    def __init__(self, *, size: int, width: int, eps: float) -> None:
        super().__init__(width=width)
        self.sizes["W"] = size
        self.eps = eps
        self.product = Product(size, width)

    def forward(
        self,
        page: Tensor,
        code: Tensor,
        stream: Tensor,
        place: Place,
        gradient: Tensor,
        statistics: Tensor,
    ) -> Tensor:
        inverse = 1 / (held(statistics, place) + self.eps)
        return self.update(page, code, place, self.product(held(gradient, place), inverse, code))


class AdamDescent(PageLayer):
    """W - rate * (m / (1 - beta1^k)) / (sqrt(n / (1 - beta2^k)) + eps), k = count: the quotient is
    a product with an activation, 1 / (sqrt(x) + eps); the rest scales.
    """

    formula = Quotient.formula

    def __init__(self, *, size: int, width: int, beta1: float, beta2: float, eps: float) -> None:
        super().__init__(width=width, add=True)
        self.sizes["W"] = size
        self.betas, self.eps = (beta1, beta2), eps
        self.product = Product(size, width)

    def forward(
        self,
        page: Tensor,
        code: Tensor,
        stream: Tensor,
        place: Place,
        first: Tensor,
        second: Tensor,
        count: Tensor,
        rate: Tensor,
    ) -> Tensor:
        moments = held(first, place), held(second, place)
        steps = along(count, moments[0], _PAGE).clamp(min=1)
        m, n = (x / (1 - beta**steps) for x, beta in zip(moments, self.betas, strict=True))
        found = self.product(m, 1 / (root(n) + self.eps), code)
        return self.update(page, code, place, found * -along(rate, found, _PAGE))


# Numbers


class PageSquare(Counted):
    """The sum of squares of what a page holds at a place, or of how far two pages differ there."""

    def __init__(self, *, size: int, width: int, of_change: bool = False) -> None:
        super().__init__(width)
        self.sizes["W"] = size
        self.square = InnerProduct(size, width)
        self.formula = InnerProduct.formula
        self.change = SplitMap(pattern([[1.0, -1.0]], size)) if of_change else None
        if of_change:
            self.formula += " + 2*W"

    def forward(
        self, code: Tensor, place: Place, page: Tensor, other: Tensor | None = None
    ) -> Tensor:
        x = wide(held(page, place))
        if self.change is not None and other is not None:
            x = _difference(self.change, x, wide(held(other, place)))
        found: Tensor = self.square(x, x, code)
        return found


class TokenSquare(Counted):
    """|sum_t dy_t x_t^T|^2 = sum_s <sum_t <dy_s, dy_t> x_t, x_s>: input tokens attend to each other
    by their gradients; no weight is formed. outputs, inputs: O and I.
    """

    formula = f"2*O + 2*I + {InnerProduct.formula}".replace("W", "I")

    def __init__(self, *, outputs: int, inputs: int, width: int) -> None:
        super().__init__(width)
        self.sizes |= {"O": outputs, "I": inputs}
        self.attention = LinearAttention(
            1, same(outputs), same(outputs), same(inputs), same(inputs)
        )
        self.product = InnerProduct(inputs, width)

    def forward(self, stream: Tensor, code: Tensor, dy: Range, x: Range) -> Tensor:
        dy_BT1O, x_BT1I = (wide(read(stream, where)).unsqueeze(-2) for where in (dy, x))
        found_BTI = self.attention(dy_BT1O, dy_BT1O, x_BT1I).squeeze(-2)
        found: Tensor = self.product(found_BTI, x_BT1I.squeeze(-2), code)
        return found


class Total(Counted):
    """The sum of several numbers: a split map. parts: N."""

    formula = "N"

    def __init__(self, *, parts: int, width: int) -> None:
        super().__init__(width)
        self.sizes["N"] = parts
        self.sum = SplitMap(pattern([[1.0] * parts], 1))

    def forward(self, *parts: Tensor) -> Tensor:
        return self.sum.whole(_stacked(*parts, behind=-1)).squeeze(-1)


class OfNumbers(Counted):
    """A square root, quotient or limit of numbers of each sequence: an activation. It has no
    parameters: its constants are scales and eps.
    """

    def __init__(
        self, *, width: int, function: Callable[..., Tensor], constants: tuple[float, ...]
    ) -> None:
        super().__init__(width)
        self.function, self.constants = function, constants

    def forward(self, *numbers: Tensor) -> Tensor:
        return self.function(*numbers, *self.constants)


def _difference(minus: SplitMap, x: Tensor, y: Tensor) -> Tensor:
    """x - y by a split map of both; either may be one page for all sequences."""
    found: Tensor = minus(_stacked(x, y, behind=-2)).squeeze(-2)
    return found


def _stacked(*values: Tensor, behind: int) -> Tensor:
    """Of one value for all sequences, or one each, along a new dimension."""
    return torch.stack(torch.broadcast_tensors(*values), behind)  # type: ignore[no-untyped-call]
