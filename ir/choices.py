"""What one emitted program may count on: the facts of a kind of call that optimizations choose
by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choices:
    """outputs: what the caller wants: `logits`, `initial_logits`, `updates`, and `losses` and
    `initial_losses` of every token. some_tokens: logits at some positions only. into: logits are
    written into tensors that the caller gives. from_updates: the updated slot values are given.
    dtype, device: of the weights. enabled: names of the optimizations that are on. differentiable:
    someone may ask for gradients through the call, so that nothing may be computed in place or by
    kernels without a derivative. causal: the attention mask is the causal one and nothing else.
    low_rank: slots whose updates stay factors (see `passes/optimize/low_rank_updates.py`)."""

    outputs: tuple[str, ...] = ()
    from_updates: bool = False
    some_tokens: bool = False
    into: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    enabled: frozenset[str] = frozenset()
    differentiable: bool = True
    causal: bool = False
    low_rank: frozenset[str] = frozenset()
