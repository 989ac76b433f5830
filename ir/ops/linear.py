"""Linear layers: y_t = W x_t + b.

Shapes: B sequences, T tokens, I inputs, O outputs. A weight is shared, (O, I), before the first
descent and belongs to each sequence, (B, O, I), after it; likewise a bias, (O,) or (B, O).
Source: TINT.md section 2, "Linear"; paper section 2.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix(parameter: Tensor, start: int, stop: int, period: int, transpose: bool) -> Tensor:
    """Reads a prefix slot: rows start..stop-1 of every `period` rows of a parameter, after
    transposing it if it is stored as (I, O).

    Consecutive rows have the whole parameter as their period; q, k and v that alternate head by
    head have that of a head.
    """
    rows = parameter.t() if transpose else parameter
    if (start, stop) == (0, period):
        return rows
    if period == parameter.shape[1 if transpose else 0]:
        return rows[start:stop]
    return torch.unflatten(rows, 0, (-1, period))[:, start:stop].flatten(0, 1)


def stack_rows(parts: list[Tensor]) -> Tensor:
    """The weights, or biases, of several layers that read the same activation, one below the
    other.
    """
    return torch.cat(parts)


def columns(x_BTD: Tensor, start: int, stop: int) -> Tensor:
    """Coordinates start .. stop-1 of a product of several layers."""
    return x_BTD[..., start:stop]


def linear_forward(x_BTI: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = W x_t + b, (B, T, O)."""
    if weight.ndim == 2 and (bias is None or bias.ndim == 1):
        return F.linear(x_BTI, weight, bias)
    if bias is None:
        return torch.matmul(x_BTI, weight.mT)
    if weight.ndim == 2:
        return torch.matmul(x_BTI, weight.mT) + bias.unsqueeze(-2)
    return torch.baddbmm(bias.unsqueeze(-2), x_BTI, weight.mT)


def linear_backward(dy_BTO: Tensor, weight: Tensor) -> Tensor:
    """dx_t = W^T dy_t, (B, T, I)."""
    return torch.matmul(dy_BTO, weight)


def linear_residual(
    x_BTI: Tensor, weight: Tensor, bias: Tensor | None, addend_BTO: Tensor, transpose: bool
) -> Tensor:
    """W x_t + b + addend_t, or W^T x_t + addend_t with transpose: a product and the residual sum
    behind it.
    """
    return (
        linear_backward(x_BTI, weight) if transpose else linear_forward(x_BTI, weight, bias)
    ) + addend_BTO


def linear_descent(weight: Tensor, dy_BTO: Tensor, x_BTI: Tensor, inner_lr: Tensor) -> Tensor:
    """W <- W - eta * sum_t dy_t x_t^T, one weight a sequence: (B, O, I). A sum over positions, not
    a mean.
    """
    return torch.baddbmm(weight, (dy_BTO * -inner_lr).mT, x_BTI)


def bias_descent(bias: Tensor, dy_BTO: Tensor, inner_lr: Tensor) -> Tensor:
    """b <- b - eta * sum_t dy_t, one bias a sequence: (B, O). Also the descent of a norm's beta,
    summed over pieces that share it.
    """
    size = bias.shape[-1]
    if size != dy_BTO.shape[-1]:
        dy_BTO = torch.unflatten(dy_BTO, -1, (-1, size)).sum(-2)
    return bias - inner_lr * dy_BTO.sum(-2)
