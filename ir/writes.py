"""Which operators of torch change an argument."""

from __future__ import annotations

import torch
from torch import fx


def writes_in_place(node: fx.Node) -> bool:
    """Whether a call changes the numbers of one of its arguments."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.is_mutable
        and target.overloadpacket is not torch.ops.aten.detach_  # changes what autograd notes
    )
