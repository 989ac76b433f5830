"""Elementwise activations y = a(x).

Each smooth activation comes with a' and a''; ReLU is piecewise linear. Shapes: any; dx and x alike.
Source: TINT.md section 2, "Activation"; paper section 2.4.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.config import ActivationGradient
from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.shapes import alike, demand, demand_one_of
from tintc.ir.precision import narrow_like, wide

_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715
_QUICK = 1.702


class Activation(NamedTuple):
    """a and, from x, the pair (a'(x), a''(x))."""

    value: Callable[[Tensor], Tensor]
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]]


def _gelu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    cumulative = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return cumulative + x * density, density * (2 - x * x)


def _gelu_tanh_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x * x * x))
    inner = _TANH_SCALE * (1 + 3 * _TANH_CUBIC * x * x)  # u' of t = tanh(u)
    slope = (1 - t * t) * inner  # t'
    bend = (1 - t * t) * (6 * _TANH_SCALE * _TANH_CUBIC * x) - 2 * t * slope * inner  # t''
    return 0.5 * (1 + t) + 0.5 * x * slope, slope + 0.5 * x * bend


def _silu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    slope = s * (1 - s)
    return s + x * slope, slope * (2 + x * (1 - 2 * s))


def _tanh_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(x)
    return 1 - t * t, -2 * t * (1 - t * t)


def _sigmoid_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    slope = s * (1 - s)
    return slope, slope * (1 - 2 * s)


def _gelu_quick_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(_QUICK * x)
    slope = _QUICK * s * (1 - s)
    return s + x * slope, slope * (2 + _QUICK * x * (1 - 2 * s))


def _relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _relu_squared_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * torch.relu(x), 2 * (x > 0).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_QUICK * x)


SMOOTH: dict[str, Activation] = {
    "gelu": Activation(F.gelu, _gelu_derivatives),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivatives),
    "gelu_quick": Activation(_gelu_quick, _gelu_quick_derivatives),
    "silu": Activation(F.silu, _silu_derivatives),
    "tanh": Activation(torch.tanh, _tanh_derivatives),
    "relu_squared": Activation(_relu_squared, _relu_squared_derivatives),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_derivatives),
}
# max(x, 0) in three spellings, with torch's derivative of each at exactly 0: relu's, that of
# clamp(min=0), and that of maximum(x, 0), which shares the gradient between equal arguments.
RELUS = {"relu": 0.0, "clamp": 1.0, "maximum": 0.5}
KINDS = (*RELUS, *SMOOTH)


def _activation_shape(x: Shape, kind: str) -> Shape:
    demand_one_of(kind, KINDS)
    return x


def _backward_shape(dy: Shape, x: Shape, kind: str, gradient: str, scale: float) -> Shape:
    demand_one_of(kind, KINDS)
    demand_one_of(gradient, get_args(ActivationGradient))
    demand(scale > 0, f"the scale of a difference is {scale}; expected a number above 0")
    return alike(dy, x)


@operator(
    "(Tensor x, str kind) -> Tensor",
    shape=_activation_shape,
    meaning="a(x)",
)
def activation_forward(x: Tensor, kind: str) -> Tensor:
    """y = a(x); kind is one of KINDS."""
    return torch.relu(x) if kind in RELUS else SMOOTH[kind].value(x)


@operator(
    "(Tensor dy, Tensor x, str kind, str gradient, float scale) -> Tensor",
    shape=_backward_shape,
    meaning="dx of an activation, first-order or exact",
    kind="backward",
)
def activation_backward(dy: Tensor, x: Tensor, kind: str, gradient: str, scale: float) -> Tensor:
    """dx of an activation.

    `first_order`: N (a(x + dy/N) - a(x)), N = scale. In float64 as it stands; below, a smooth a
    uses a'(x) dy + a''(x) dy^2 / (2N), whose error is of third order in dy/N. ReLU's difference is
    piecewise linear and needs no subtraction of close numbers; that of its square is ReLU's times
    the sum of both values.
    `exact`: a'(x) dy.
    """
    u, v = wide(x), wide(dy)
    if kind in RELUS:
        dx = v * relu_slope(u, kind) if gradient == "exact" else _relu_difference(v, u, scale)
    elif kind == "relu_squared" and gradient == "first_order":
        dx = _relu_difference(v, u, scale) * (torch.relu(u + v / scale) + torch.relu(u))
    elif gradient == "first_order" and x.dtype == torch.float64:
        value = SMOOTH[kind].value
        dx = (value(u + v / scale) - value(u)) * scale
    else:
        first, second = SMOOTH[kind].derivatives(u)
        dx = first * v if gradient == "exact" else v * (first + second * v * (0.5 / scale))
    return narrow_like(dx, x)


def relu_slope(x: Tensor, kind: str) -> Tensor:
    """1 above 0, 0 below, and at 0 what RELUS says."""
    if kind == "relu":
        return x > 0
    return x >= 0 if kind == "clamp" else (x > 0) * 0.5 + (x >= 0) * 0.5


def _relu_difference(dy: Tensor, x: Tensor, scale: float) -> Tensor:
    """N (a(x + dy/N) - a(x)), whatever the spelling."""
    reach = x * scale  # the difference is clamped where x + dy/N changes sign, on either side of 0
    return torch.maximum(dy, -reach) + reach.clamp(max=0)
