"""Norms: y = gamma * f(x) + beta over the last dimension.

`layer`: f(x) = (x - mean) / sqrt(eps + var). `rms`: f(x) = x / sqrt(eps + mean(x^2)).
Shapes: x, dy (B, T, D); gamma and beta (D,) shared or (B, D) after a descent, or None.
Source: TINT.md section 2, "Layer norm"; paper section 2.4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.runtime.primitives.precision import narrow_like, wide


def norm_forward(x_BTD: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, kind: str) -> Tensor:
    """y = gamma * f(x) + beta."""
    width = (x_BTD.shape[-1],)
    shared = (gamma is None or gamma.ndim == 1) and (beta is None or beta.ndim == 1)
    if kind == "layer" and shared:
        return F.layer_norm(x_BTD, width, gamma, beta, eps)
    y_BTD = _normalized(x_BTD, width, eps, kind)
    if gamma is not None:
        y_BTD = y_BTD * gamma.unsqueeze(-2)
    return y_BTD if beta is None else y_BTD + beta.unsqueeze(-2)


def norm_backward(dy_BTD: Tensor, x_BTD: Tensor, gamma: Tensor | None, eps: float, kind: str, gradient: str, scale: float) -> Tensor:
    """dx of a norm, with g = gamma * dy.

    `first_order`: N (f(x + g/N) - f(x)), N = scale, in a form without cancellation. With c = x - mean(x),
    e = d - mean(d), d = g/N and s = sqrt(eps + var): s'^2 - s^2 = mean(2ce + ee), and
    f(x + d) - f(x) = e/s' + c (1/s' - 1/s) with 1/s' - 1/s = (s^2 - s'^2) / (s s' (s + s')).
    `exact`: (g - mean(g) - f mean(g f)) / s; an RMS norm has no mean(g).
    """
    x, g = wide(x_BTD), wide(dy_BTD)
    if gamma is not None:
        g = g * wide(gamma).unsqueeze(-2)
    c, g = (_centered(x), _centered(g)) if kind == "layer" else (x, g)
    s = torch.sqrt(eps + _mean(c * c))
    if gradient == "exact":
        dx = g / s - c * (_mean(g * c) / (s * s * s))
    else:
        grown = _mean(2 * c * g + g * g / scale) / scale  # s'^2 - s^2
        s_new = torch.sqrt(s * s + grown)
        dx = g / s_new - c * (scale * grown / (s * s_new * (s + s_new)))
    return narrow_like(dx, x_BTD)


def norm_descent(gamma: Tensor, dy_BTD: Tensor, x_BTD: Tensor, eps: float, kind: str, inner_lr: Tensor) -> Tensor:
    """gamma <- gamma - eta * sum_t dy_t * f(x_t), one gamma a sequence: (B, D)."""
    f_BTD = _normalized(x_BTD, (x_BTD.shape[-1],), eps, kind)
    return gamma - inner_lr * (dy_BTD * f_BTD).sum(-2)


def _normalized(x_BTD: Tensor, width: tuple[int, ...], eps: float, kind: str) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x_BTD, width, None, None, eps)
    x = wide(x_BTD)
    return narrow_like(x * torch.rsqrt(eps + _mean(x * x)), x_BTD)


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _centered(x: Tensor) -> Tensor:
    return x - _mean(x)
