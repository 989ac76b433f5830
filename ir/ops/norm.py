"""Norms: y = (gamma + offset) * f(x) + beta over pieces of the last dimension.

`layer`: f(x) = (x - mean) / sqrt(eps + var). `rms`: f(x) = x / sqrt(eps + mean(x^2)). `scale`: f(x)
= x, a learned scale.
Shapes: x, dy (B, T, H*D): H pieces, normalised one by one with the same gamma and beta (norms of q
and k have a piece a head, others one); gamma and beta (D,) shared or (B, D) after a descent, or
None. offset: 1 where the model stores gamma - 1, else 0.
Source: TINT.md section 2, "Layer norm"; paper section 2.4.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.config import NormGradient
from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.rates import along
from tintc.ir.ops.shapes import (
    alike,
    demand,
    demand_activation,
    demand_one_of,
    demand_rate,
    demand_weight,
    each_vector,
    part,
)
from tintc.ir.precision import narrow_like, wide

KINDS = ("layer", "rms", "scale")


def _demand_norm(x: Shape, eps: float, kind: str, heads: int, *vectors: Shape | None) -> None:
    demand_activation(x)
    demand_one_of(kind, KINDS)
    demand(eps >= 0, f"eps is {eps}; expected at least 0")
    size = part(x[-1], heads)
    for vector in vectors:
        demand_weight(vector, x[0], size)


def _norm_shape(
    x: Shape, gamma: Shape | None, beta: Shape | None, eps: float, kind: str, heads: int, *_: float
) -> Shape:
    _demand_norm(x, eps, kind, heads, gamma, beta)
    return x


def _backward_shape(
    dy: Shape, x: Shape, gamma: Shape | None, eps: float, kind: str, heads: int, offset: float,
    gradient: str, scale: float,
) -> Shape:  # fmt: skip
    _demand_norm(x, eps, kind, heads, gamma)
    demand_one_of(gradient, get_args(NormGradient))
    demand(scale > 0, f"the scale of a difference is {scale}; expected a number above 0")
    return alike(dy, x)


def _descent_shape(
    gamma: Shape, dy: Shape, x: Shape, eps: float, kind: str, heads: int, rate: Shape
) -> Shape:
    _demand_norm(x, eps, kind, heads, gamma)
    alike(dy, x)
    demand_rate(rate)
    return each_vector(gamma)


@operator(
    "(Tensor x, Tensor? gamma, Tensor? beta, float eps, str kind, int heads, float offset) ->"
    " Tensor",
    shape=_norm_shape,
    meaning="(gamma + offset) f(x) + beta",
    weights=("gamma", "beta"),
)
def norm_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    kind: str,
    heads: int,
    offset: float,
) -> Tensor:
    """y = (gamma + offset) * f(x) + beta."""
    shared = (gamma is None or gamma.ndim == 1) and (beta is None or beta.ndim == 1)
    alike = all(w is None or w.dtype == x.dtype for w in (gamma, beta))
    if kind == "layer" and shared and alike and offset == 0:
        return _joined(
            F.layer_norm(_pieces(x, heads), (x.shape[-1] // heads,), gamma, beta, eps), heads
        )
    y = _normalized(x, eps, kind, heads)
    if gamma is not None:
        y = y * _gain(gamma, heads, offset)
    y = y if beta is None else y + _along_tokens(beta, heads)
    return narrow_like(_joined(y, heads), x)


@operator(
    "(Tensor dy, Tensor x, Tensor? gamma, float eps, str kind, int heads, float offset, str "
    "gradient, float scale) -> Tensor",
    shape=_backward_shape,
    meaning="dx of a norm, first-order or exact",
    kind="backward",
)
def norm_backward(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    eps: float,
    kind: str,
    heads: int,
    offset: float,
    gradient: str,
    scale: float,
) -> Tensor:
    """dx of a norm, with g = (gamma + offset) * dy.

    `first_order`: N (f(x + g/N) - f(x)), N = scale, in a form without cancellation. With c = x -
    mean(x), e = d - mean(d), d = g/N and s = sqrt(eps + var): s'^2 - s^2 = mean(2ce + ee), and
    f(x + d) - f(x) = e/s' + c (1/s' - 1/s) with 1/s' - 1/s = (s^2 - s'^2) / (s s' (s + s')).
    `exact`: (g - mean(g) - f mean(g f)) / s; an RMS norm has no mean(g). A learned scale is linear:
    g is both.
    """
    c, g = _pieces(wide(x), heads), _pieces(wide(dy), heads)
    if gamma is not None:
        g = g * _gain(wide(gamma), heads, offset)
    if kind == "scale":
        return narrow_like(_joined(g, heads), x)
    if kind == "layer":
        c, g = _centered(c), _centered(g)
    s = torch.sqrt(eps + _mean(c * c))
    if gradient == "exact":
        dx = g / s - c * (_mean(g * c) / (s * s * s))
    else:
        grown = _mean(2 * c * g + g * g / scale) / scale  # s'^2 - s^2
        s_new = torch.sqrt(s * s + grown)
        dx = g / s_new - c * (scale * grown / (s * s_new * (s + s_new)))
    return narrow_like(_joined(dx, heads), x)


@operator(
    "(Tensor gamma, Tensor dy, Tensor x, float eps, str kind, int heads, Tensor rate) -> Tensor",
    shape=_descent_shape,
    meaning="gamma - rate sum_t dy f(x)",
    kind="descent",
)
def norm_descent(
    gamma: Tensor, dy: Tensor, x: Tensor, eps: float, kind: str, heads: int, rate: Tensor
) -> Tensor:
    """gamma <- gamma - rate * sum_t dy_t * f(x_t), one gamma a sequence: (B, D). The pieces that
    share it add up.
    """
    change = _pieces(wide(dy), heads) * _normalized(x, eps, kind, heads)
    if heads > 1:
        change = change.sum(-2)
    change = change.sum(-2)
    return wide(gamma) - along(rate, x, 1) * change


def _pieces(x: Tensor, heads: int) -> Tensor:
    return x if heads == 1 else torch.unflatten(x, -1, (heads, -1))


def _joined(x: Tensor, heads: int) -> Tensor:
    return x if heads == 1 else x.flatten(-2)


def _gain(gamma: Tensor, heads: int, offset: float) -> Tensor:
    gain = _along_tokens(gamma, heads)
    return gain + offset if offset else gain


def _along_tokens(vector: Tensor, heads: int) -> Tensor:
    """(D,) or (B, D) -> what broadcasts over tokens and pieces."""
    return vector.unsqueeze(-2) if heads == 1 else vector.unsqueeze(-2).unsqueeze(-2)


def _normalized(x: Tensor, eps: float, kind: str, heads: int) -> Tensor:
    """f of each piece, wide; (B, T, H, D) where there are several."""
    u = _pieces(wide(x), heads)
    if kind == "scale":
        return u
    if kind == "layer":
        return F.layer_norm(u, (x.shape[-1] // heads,), None, None, eps)
    return u * torch.rsqrt(eps + _mean(u * u))


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _centered(x: Tensor) -> Tensor:
    return x - _mean(x)
