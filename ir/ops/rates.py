"""Rates: the numbers that steps are multiplied by: one for all sequences, (), or one each, (B,).

Where the inner rule asks for more than eta times a gradient, its factors are computed here, from
sums of squares over weights. A rate is wider than half-precision weights.
Source: TINT.md section 7.
"""

import torch
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape, side_by_side
from tintc.ir.ops.shapes import alike, demand, demand_rate, said
from tintc.ir.precision import wide, wide_dtype

CLIP_EPS, NORMAL_EPS = 1e-6, 1e-9


def along(rate: Tensor, like: Tensor, behind: int) -> Tensor:
    """The rate as it multiplies tensors that have `behind` further dimensions, in like's type, but
    at least float32.
    """
    if rate.ndim == 0:
        return rate
    each = rate.to(wide_dtype(like.dtype))
    for _ in range(behind):
        each = each.unsqueeze(-1)
    return each


def _rates(*rates: Shape | None) -> Shape:
    """Of a result that depends on all of these."""
    for rate in rates:
        demand_rate(rate or ())
    return next((rate for rate in rates if rate), ())


def _rate_shape(inner_lr: Shape, factor: Shape | None, scale: float, with_lr: bool) -> Shape:
    demand(inner_lr == (), f"the inner learning rate has shape {inner_lr}; expected a number")
    return _rates(inner_lr, factor)


@operator(
    "(Tensor inner_lr, Tensor? factor, float scale, bool with_lr) -> Tensor",
    shape=_rate_shape,
    meaning="scale x factor, times eta if asked for",
    kind="descent",
)
def rate(inner_lr: Tensor, factor: Tensor | None, scale: float, with_lr: bool) -> Tensor:
    """scale * factor * (eta if with_lr else 1); no factor is 1."""
    found = inner_lr * scale if with_lr else torch.full_like(inner_lr, scale)
    return found if factor is None else found * factor


def _total_shape(parts: list[Shape]) -> Shape:
    demand(bool(parts), "a sum has no parts")
    return _rates(*parts)


@operator(
    "(Tensor[] parts) -> Tensor",
    shape=_total_shape,
    meaning="sum of squares of several weights",
    kind="descent",
)
def total(parts: list[Tensor]) -> Tensor:
    """The sum of rates, or of sums of squares."""
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    return found


def _limited_shape(squares: Shape, limit: float) -> Shape:
    demand(limit > 0, f"a limit is {limit}; expected a number above 0")
    return _rates(squares)


@operator(
    "(Tensor squares, float limit) -> Tensor",
    shape=_limited_shape,
    meaning="min(1, c / (|g| + 1e-6))",
    kind="descent",
)
def clip_factor(squares: Tensor, limit: float) -> Tensor:
    """min(1, c / (G + 1e-6)), G^2 = squares: that of torch.nn.utils.clip_grad_norm_."""
    return (limit / (root(squares) + CLIP_EPS)).clamp(max=1.0)


@operator(
    "(Tensor squares, float numbers) -> Tensor",
    shape=_limited_shape,
    meaning="1 / (root mean square of g + 1e-9)",
    kind="descent",
)
def normal_factor(squares: Tensor, numbers: float) -> Tensor:
    """1 / (sqrt(squares / numbers) + 1e-9): what makes a weight's gradient of root mean square 1.

    numbers: those of the weight.
    """
    return 1 / (root(squares / numbers) + NORMAL_EPS)


def _drift_shape(change: Shape, original: Shape, limit: float) -> Shape:
    return _limited_shape(_rates(change, original), limit)


@operator(
    "(Tensor change, Tensor original, float limit) -> Tensor",
    shape=_drift_shape,
    meaning="share of a change that exceeds its limit",
    kind="descent",
)
def drift_share(change: Tensor, original: Tensor, limit: float) -> Tensor:
    """1 - min(1, r |W_0| / |W - W_0|), from the squares of both norms; 0 where W_0 is 0."""
    allowed = limit * root(original)
    share = 1 - (allowed / root(change).clamp(min=_tiny(change))).clamp(max=1.0)
    return torch.where(original == 0, torch.zeros_like(share), share)


def root(squares: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is 0: outer gradients of a sequence without a
    training token are finite.
    """
    positive = squares > 0
    found = torch.sqrt(torch.where(positive, squares, torch.ones_like(squares)))
    return torch.where(positive, found, torch.zeros_like(found))


def _tiny(x: Tensor) -> float:
    return 1e-300 if x.dtype == torch.float64 else 1e-38


# What optimizations put in the place of chains of weights.


def _combine_shape(a: Shape, b: Shape | None, x: float, y: float) -> Shape:
    return _rates(a, b)


@operator(
    "(Tensor a, Tensor? b, float x, float y) -> Tensor",
    shape=_combine_shape,
    meaning="x a + y b, or x a + y",
    kind="optimization",
    wide=True,
)
def combine(a: Tensor, b: Tensor | None, x: float, y: float) -> Tensor:
    """x a + y b; without b, x a + y."""
    return a * x + (y if b is None else b * y)


def _product_shape(a: Shape, b: Shape) -> Shape:
    return _rates(a, b)


@operator(
    "(Tensor a, Tensor b) -> Tensor",
    shape=_product_shape,
    meaning="product of two rates",
    kind="optimization",
    wide=True,
)
def product(a: Tensor, b: Tensor) -> Tensor:
    """a b."""
    return a * b


def _spread_shape(rates: list[Shape], factors: list[Shape]) -> Shape:
    return (factors[0][0], side_by_side([factor[1] for factor in factors]))


@operator(
    "(Tensor[] rates, Tensor[] factors) -> Tensor",
    shape=_spread_shape,
    meaning="the rate of each token of factors of several steps",
    kind="optimization",
    wide=True,
)
def spread(rates: list[Tensor], factors: list[Tensor]) -> Tensor:
    """The rates of several steps, (B, S + S + ...): each at the tokens of its step's factors."""
    parts = []
    for rate, tokens_BSD in zip(rates, factors, strict=True):
        dtype = wide_dtype(tokens_BSD.dtype)
        each = rate.to(dtype).unsqueeze(-1) if rate.ndim else rate.to(dtype)
        parts.append(torch.ones_like(tokens_BSD[..., 0]).to(dtype) * each)
    return torch.cat(parts, 1)


def _token_products_shape(x: Shape, y: Shape) -> Shape:
    demand(
        len(x) == len(y) == 3 and (x[0], x[-1]) == (y[0], y[-1]),
        f"tokens have shapes {said(x)} and {said(y)}; expected the same width",
    )
    return (x[0], x[1], y[1])


@operator(
    "(Tensor x, Tensor y) -> Tensor",
    shape=_token_products_shape,
    meaning="x_s . y_r of all tokens",
    kind="optimization",
    wide=True,
)
def token_products(x_BSD: Tensor, y_BRD: Tensor) -> Tensor:
    """x_s . y_r, (B, S, R). Layers that read one activation share those of their inputs."""
    return torch.matmul(wide(x_BSD), wide(y_BRD).mT)


def _products_shape(of_values: Shape, of_keys: Shape, count: int) -> Shape:
    demand(count > 0, f"{count} gradients have no products")
    return (alike(of_values, of_keys)[0], count)


@operator(
    "(Tensor of_values, Tensor of_keys, int count) -> Tensor",
    shape=_products_shape,
    meaning="<sum dy x^T, sum dy' x'^T> from products of tokens",
    kind="optimization",
    wide=True,
)
def gradient_products(of_values_BSR: Tensor, of_keys_BSR: Tensor, count: int) -> Tensor:
    """<sum_s dy_s x_s^T, sum_r dy'_r x'_r^T> = sum_sr (dy_s . dy'_r) (x_s . x'_r), (B, count): of
    one step's gradient with those of `count` steps, whose tokens r stand side by side.

    No weight is formed.
    """
    products_BR = (of_values_BSR * of_keys_BSR).sum(-2)
    return torch.unflatten(products_BR, -1, (count, -1)).sum(-1)


def _sum_square_shape(rates: list[Shape], own: list[Shape], earlier: list[Shape]) -> Shape:
    count = len(rates)
    demand(
        (len(own), [row[1:] for row in earlier]) == (count, [(k,) for k in range(1, count)]),
        f"{count} gradients have not {len(own)} squares and products {[said(e) for e in earlier]}",
    )
    return (own[0][0],)


@operator(
    "(Tensor[] rates, Tensor[] own, Tensor[] earlier) -> Tensor",
    shape=_sum_square_shape,
    meaning="|sum_k rate_k g_k|^2 from products of the g_k",
    kind="optimization",
    wide=True,
)
def sum_square(rates: list[Tensor], own: list[Tensor], earlier: list[Tensor]) -> Tensor:
    """|sum_k c_k g_k|^2 = sum_k c_k (c_k <g_k, g_k> + 2 sum_j<k c_j <g_k, g_j>), (B,).

    own: <g_k, g_k>, (B, 1) each. earlier: of each k but the first <g_k, g_j> for j < k, (B, k).
    """
    found = rates[0] * rates[0] * own[0][:, 0]
    for k in range(1, len(rates)):
        part = rates[k] * own[k][:, 0]
        for j in range(k):
            part = part + rates[j] * 2 * earlier[k - 1][:, j]
        found = found + rates[k] * part
    return found
