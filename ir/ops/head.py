"""The vocabulary head in chunks of tokens, so that the logits of all positions never exist at once.

Shapes: h (B, T, D) hidden states, E (V, D) the head's weight, b (V,) its bias or None, targets and
mask (B, T). `behind` names what stands between the head and the loss, in order: `scale` or a kind
of activation (a soft-cap of the logits), with its factor. rows: tokens in a chunk; 0 for as many as
have CHUNK_NUMBERS logits.
Source: TINT.md section 2, "Loss".
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.activation import activation_backward, activation_forward
from tintc.ir.ops.onednn import onednn_product
from tintc.ir.ops.shapes import same_shape
from tintc.ir.ops.wide import wide_linear
from tintc.ir.precision import narrow_like, wide

CHUNK_NUMBERS = {
    "cpu": 2**22,
    "cuda": 2**27,
}  # logits in one chunk: large enough for full products, small beside the activations
_TURNS = 8  # in which a chunk's logits become what is wanted of them


@operator(
    "(Tensor h, Tensor weight, Tensor? bias, Tensor targets, Tensor mask, str kind, str[] "
    "behind, float[] factors, int rows, bool onednn) -> Tensor",
    shape=same_shape,
    meaning="gradient of the summed loss at the head's input, in chunks",
    kind="optimization",
    whole=True,
)
def head_gradient(
    h_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_BT: Tensor, mask_BT: Tensor,
    kind: str, behind: list[str], factors: list[float], rows: int, onednn: bool,
) -> Tensor:  # fmt: skip
    """The loss's gradient at h, (B, T, D), summed over positions: m_t E^T (p_t - 1_y), with p_t the
    softmax of the logits or, for `quadratic`, the logits; what stands behind the head follows the
    chain rule."""
    h, targets = h_BTD.flatten(0, 1), targets_BT.flatten()
    dh = torch.empty_like(h)
    for part in _chunks(h, weight_VD, rows):
        values = _logits(h[part], weight_VD, bias_V, behind, factors, onednn)
        dh[part] = _way_back(values, weight_VD, targets[part], kind, behind, factors, onednn)
    return dh.view_as(h_BTD) * mask_BT.unsqueeze(-1)


def _way_back(
    values: list[Tensor], weight_VD: Tensor, targets: Tensor, kind: str, behind: list[str],
    factors: list[float], onednn: bool,
) -> Tensor:  # fmt: skip
    """The loss's gradient at the head's input. values: the head's product, and what each operator
    behind it made of it; they are used up, so that a chunk does not outlive its turn.
    """
    dz = values.pop()
    _become_gradient(dz, targets, kind)
    for name, factor in zip(reversed(behind), reversed(factors), strict=True):
        z = values.pop()
        scaled = name == "scale"
        dz = dz * factor if scaled else activation_backward(dz, z, name, "exact", factor)
    return _product(dz, weight_VD, None, True, onednn)


def _become_gradient(z_NV: Tensor, targets_N: Tensor, kind: str) -> None:
    """`loss_gradient` in place, some rows at a time: copies of a chunk are the peak of a call."""
    for rows in _turns(z_NV):
        z, y = z_NV[rows], targets_N[rows].unsqueeze(-1)
        dz = torch.softmax(wide(z), -1) if kind == "softmax" else wide(z).clone()
        z.copy_(dz.scatter_add_(-1, y, torch.full_like(y, -1, dtype=dz.dtype)))


def _both_shape(h: Shape, *_: object) -> tuple[Shape, Shape]:
    return h[:-1], h


@operator(
    "(Tensor h, Tensor weight, Tensor? bias, Tensor labels, Tensor targets, Tensor mask, str kind, "
    "str[] behind, float[] factors, int rows, bool onednn) -> (Tensor, Tensor)",
    shape=_both_shape,
    meaning="head_losses and head_gradient, from the same logits",
    kind="optimization",
    whole=True,
)
def head_losses_and_gradient(
    h_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_BT: Tensor,
    targets_BT: Tensor, mask_BT: Tensor, kind: str, behind: list[str], factors: list[float],
    rows: int, onednn: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(losses (B, T), gradient at h (B, T, D)): what both are of h, whose logits exist once."""
    h, targets, labels = h_BTD.flatten(0, 1), targets_BT.flatten(), labels_BT.flatten()
    losses, dh = [], torch.empty_like(h)
    for part in _chunks(h, weight_VD, rows):
        values = _logits(h[part], weight_VD, bias_V, behind, factors, onednn)
        losses += _losses(values[-1], labels[part])
        dh[part] = _way_back(values, weight_VD, targets[part], kind, behind, factors, onednn)
    return torch.cat(losses).view_as(labels_BT), dh.view_as(h_BTD) * mask_BT.unsqueeze(-1)


def _head_logits_shape(
    h: Shape,
    weight: Shape,
    bias: Shape | None,
    behind: list[str],
    factors: list[float],
    into: Shape,
    rows: int,
    onednn: bool,
) -> Shape:
    return into


@operator(
    "(Tensor h, Tensor weight, Tensor? bias, str[] behind, float[] factors, Tensor into, int "
    "rows, bool onednn) -> Tensor",
    shape=_head_logits_shape,
    meaning="logits from the head's input, in chunks, into a given tensor",
    kind="optimization",
    whole=True,
)
def head_logits(
    h_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    behind: list[str],
    factors: list[float],
    into_BTV: Tensor,
    rows: int,
    onednn: bool,
) -> Tensor:
    """The logits of h, written into a tensor of the caller, which is returned."""
    h, into = h_BTD.flatten(0, 1), into_BTV.view(-1, into_BTV.shape[-1])
    for part in _chunks(h, weight_VD, rows):
        into[part] = _logits(h[part], weight_VD, bias_V, behind, factors, onednn)[-1]
    return into_BTV


def _head_losses_shape(h: Shape, *_: object) -> Shape:
    return h[:-1]


@operator(
    "(Tensor h, Tensor weight, Tensor? bias, Tensor labels, str[] behind, float[] factors, "
    "int rows, bool onednn) -> Tensor",
    shape=_head_losses_shape,
    meaning="token_losses from the head's input, in chunks",
    kind="optimization",
    whole=True,
)
def head_losses(
    h_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_BT: Tensor,
    behind: list[str],
    factors: list[float],
    rows: int,
    onednn: bool,
) -> Tensor:
    """As `token_losses`, of the logits that belong to h: (B, T)."""
    h, labels = h_BTD.flatten(0, 1), labels_BT.flatten()
    losses = []
    for part in _chunks(h, weight_VD, rows):
        z = _logits(h[part], weight_VD, bias_V, behind, factors, onednn)[-1]
        losses += _losses(z, labels[part])
        del z  # or it would live beside the next chunk
    return torch.cat(losses).view_as(labels_BT)


def _token_losses_shape(logits: Shape, labels: Shape) -> Shape:
    return labels


@operator(
    "(Tensor logits, Tensor labels) -> Tensor",
    shape=_token_losses_shape,
    meaning="-log p(label) at every position",
    kind="optimization",
)
def token_losses(z_V: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) at every position, in at least float32; 0 where the label is -100. z (..., V),
    labels (...).
    """
    losses = F.cross_entropy(
        wide(z_V).flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view_as(labels)


def _losses(z_NV: Tensor, labels_N: Tensor) -> list[Tensor]:
    """`token_losses` of some rows at a time."""
    return [token_losses(z_NV[rows], labels_N[rows]) for rows in _turns(z_NV)]


def _turns(z_NV: Tensor) -> Iterator[slice]:
    """Some of a chunk's rows at a time."""
    return _parts(len(z_NV), _TURNS)


def _chunks(h: Tensor, weight_VD: Tensor, rows: int) -> Iterator[slice]:
    """As few as fit."""
    most = CHUNK_NUMBERS.get(h.device.type, CHUNK_NUMBERS["cuda"])
    numbers = len(h) * len(weight_VD)
    return _parts(len(h), -(-len(h) // rows) if rows else -(-numbers // most))


def _parts(rows: int, count: int) -> Iterator[slice]:
    """At most so many, all of the same size but for the last."""
    size = max(1, -(-rows // max(count, 1)))
    return (slice(start, start + size) for start in range(0, rows, size))


def _logits(
    h: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    behind: list[str],
    factors: list[float],
    onednn: bool,
) -> list[Tensor]:
    """The head's products and what each operator behind it makes of them; all but the last are for
    the way back.
    """
    values = [_product(h, weight_VD, bias_V, False, onednn)]
    for name, factor in zip(behind, factors, strict=True):
        values.append(
            values[-1] * factor if name == "scale" else activation_forward(values[-1], name)
        )
    return values


def _product(
    x: Tensor, weight_VD: Tensor, bias_V: Tensor | None, transpose: bool, onednn: bool
) -> Tensor:
    if onednn:
        return onednn_product(x, weight_VD, bias_V, None, transpose)
    if weight_VD.dtype != x.dtype or (bias_V is not None and bias_V.dtype != x.dtype):
        return narrow_like(wide_linear(x, weight_VD, bias_V, transpose), x)
    product: Callable[..., Tensor] = torch.matmul if transpose else F.linear
    return product(x, weight_VD) if bias_V is None else product(x, weight_VD, bias_V)


# All that compute a head; `onednn` is the last argument of each.
HEADS = (head_gradient, head_losses, head_losses_and_gradient, head_logits)
