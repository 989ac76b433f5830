"""One step of SGD by torch.autograd, for the loops that simulators are compared with.

    W_k  ->  W_{k+1} = W_k - inner_lr * dL/dW (W_k),  L the sum of the targets' cross-entropies

`compiler/verification.py` has a step of its own: it checks simulators, and is checked by nothing
here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.precision import wide


def summed_loss(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    """L, in at least float32."""
    return F.cross_entropy(wide(logits_KV), targets_K, reduction="sum")


def step(loss: Tensor, weights: dict[str, Tensor], inner_lr: float) -> dict[str, Tensor]:
    """New weights, which ask for gradients as the old ones do."""
    gradients = _gradients(loss, weights)
    with torch.no_grad():
        return {
            name: torch.sub(weight, gradients.pop(name), alpha=inner_lr).requires_grad_()
            for name, weight in weights.items()
        }


def step_in_place(loss: Tensor, weights: dict[str, Tensor], inner_lr: float) -> None:
    """The same on the weights themselves."""
    gradients = _gradients(loss, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.sub_(gradients.pop(name), alpha=inner_lr)


def _gradients(loss: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each is let go of by its user as soon as it is used."""
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
