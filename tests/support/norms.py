"""What the tests know of norm modules: which modules they are, and the parts of y = gain * f(x) +
shift.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and every family's own class of either; not containers such as StableLM's
    norm per head.
    """
    return type(module).__name__.endswith("Norm") and not list(module.children())


def gain_is_added_to_one(norm: nn.Module) -> bool:
    """Gemma stores the gain minus 1."""
    return type(norm).__name__.startswith("Gemma")


def shift(norm: nn.Module) -> Tensor | None:
    return getattr(norm, "bias", None)


def centred(norm: nn.Module) -> bool:
    """Whether f subtracts the mean."""
    return "RMS" not in type(norm).__name__


def epsilon(norm: nn.Module) -> float:
    for name in ("eps", "variance_epsilon"):
        if getattr(norm, name, None) is not None:
            return float(getattr(norm, name))
    raise AssertionError(f"{type(norm).__name__} has no epsilon")


def normalized(x: Tensor, centre: bool, eps: float) -> Tensor:
    """f(x) over the last dimension."""
    x = x - x.mean(-1, keepdim=True) if centre else x
    return x / torch.sqrt(eps + (x**2).mean(-1, keepdim=True))
