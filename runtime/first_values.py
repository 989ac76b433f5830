"""What the first step starts from: the auxiliary weights, and nothing learned."""

from __future__ import annotations

import torch
from torch import Tensor

from tintc.ir.builder import before_step
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import prefix
from tintc.ir.precision import wide_dtype
from tintc.runtime.compiled import Compiled


def original(simulator: Compiled, slot: str) -> Tensor:
    """W_0 of a slot, (O, I) or (D,): a view of the auxiliary parameter where one is possible."""
    read = before_step(simulator.program.graph)[slot]
    where = simulator.program.layout.prefix[slot]
    value = simulator.prefix.tensors()[where.parameter].detach()
    return prefix(value, *read.args[1:])  # type: ignore[arg-type]


def first_values(simulator: Compiled, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(slot -> W_0, slot -> 0 of the inner rule's own), one for each of B sequences: what a step
    starts from. All are own tensors of the caller.
    """
    given, states = {}, {}
    weights = simulator.prefix.tensors()
    for slot, node in before_step(simulator.program.graph).items():
        if is_tint(node, prefix):
            where = simulator.program.layout.prefix[slot]
            value = prefix(weights[where.parameter].detach(), *node.args[1:])  # type: ignore[arg-type]
            given[slot] = value.to(simulator.own_dtype).repeat(batch, *(1 for _ in value.shape))
        else:
            sizes = [size for size in info(node).shape if isinstance(size, int)]
            dtype = simulator.own_dtype if sizes else wide_dtype(simulator.dtype)
            states[slot] = torch.zeros(batch, *sizes, dtype=dtype, device=simulator.device)
    return given, states
