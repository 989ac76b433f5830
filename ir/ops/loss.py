"""Gradient of the next-token loss, summed over training positions. Source: TINT.md section 2,
"Loss"; paper section 2.6.

Shapes: z (B, T, V) logits, targets (B, T) int64, mask (B, T) with 1 where a position carries loss.
"""

import torch
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.shapes import demand, demand_activation, demand_one_of, said
from tintc.ir.precision import narrow_like, wide

KINDS = ("softmax", "mean_embedding", "quadratic")


def _loss_shape(logits: Shape, targets: Shape, mask: Shape, kind: str) -> Shape:
    demand_activation(logits)
    demand_one_of(kind, KINDS)
    demand(
        targets == mask == logits[:-1],
        f"logits {said(logits)}, targets {said(targets)} and mask {said(mask)} do not fit",
    )
    return logits


@operator(
    "(Tensor logits, Tensor targets, Tensor mask, str kind) -> Tensor",
    shape=_loss_shape,
    meaning="gradient of the summed loss at the logits",
    kind="backward",
    takes={"targets": "int"},
)
def loss_gradient(z_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor, kind: str) -> Tensor:
    """Gradient at the logits, (B, T, V): m_t (softmax(z_t) - 1_y), m_t (z_t - 1_y) for
    `quadratic`, m_t (1/V - 1_y) for `mean_embedding`.

    The head's backward then makes it a gradient at h: E^T of it, which is the table of TINT.md; a
    bias, a scale or a cap of the logits follows by the chain rule.
    """
    p_BTV = wide(z_BTV)
    if kind == "softmax":
        p_BTV = torch.softmax(p_BTV, -1)
    elif kind == "mean_embedding":
        p_BTV = torch.full_like(p_BTV, 1 / z_BTV.shape[-1])
    y_BT1 = targets_BT.unsqueeze(-1)
    minus_one = torch.full_like(y_BT1, -1, dtype=p_BTV.dtype)
    return narrow_like(p_BTV.scatter_add(-1, y_BT1, minus_one) * mask_BT.unsqueeze(-1), z_BTV)


def _mean_embedding_shape(weight: Shape, targets: Shape, mask: Shape) -> Shape:
    demand(len(weight) == 2, f"the head has shape {said(weight)}; expected (V, D)")
    demand(
        len(targets) == 2 and targets == mask,
        f"targets {said(targets)} and mask {said(mask)} do not fit",
    )
    return (*targets, weight[-1])


@operator(
    "(Tensor weight, Tensor targets, Tensor mask) -> Tensor",
    shape=_mean_embedding_shape,
    meaning="mean_v E[v] - E[y], no softmax",
    kind="backward",
    takes={"targets": "int"},
)
def mean_embedding_gradient(weight_VD: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Gradient at h_t without a softmax, (B, T, D): m_t (mean_v E[v] - E[y]). Where the head learns
    too, `loss_gradient` of this kind gives the gradient at the logits.
    """
    return (weight_VD.mean(0) - weight_VD[targets_BT]) * mask_BT.unsqueeze(-1)
