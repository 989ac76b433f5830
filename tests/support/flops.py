"""torch's count of FLOPs, with what it does not know."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counting() -> FlopCounterMode:
    """Counts products in place, too."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _written_over})


def _written_over(weight: Any, left: Any, right: Any, **_: Any) -> int:
    """(B, O, S) times (B, S, I)."""
    return int(2 * left.numel() * right[-1])
