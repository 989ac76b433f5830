"""Experts of a mixture as products over all tokens, while a model is traced.

By default transformers loops over the experts that a batch needs, or sorts tokens by expert and
counts them: which operators run depends on the data. It has another implementation of its own,
which looks up the weights of each token's experts: the same numbers, in one computation for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

_LOOKED_UP = "batched_mm"


@contextmanager
def experts_looked_up(model: nn.Module) -> Iterator[None]:
    """Switches to it what can be switched, and back."""
    switched = []
    for module in model.modules():  # a module of one's own may hold a model of transformers
        if isinstance(module, PreTrainedModel):
            switched.append((module, module.get_experts_implementation()))
            module.set_experts_implementation(_LOOKED_UP)
    try:
        yield
    finally:
        for module, before in reversed(switched):
            module.set_experts_implementation(before)
