"""Gradients of an outer loss, from outside of the simulator."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.tolerances import error
from tintc.runtime.simulator import Simulator


def assert_same_gradients(
    simulator: Simulator, expected: Tensor, found: Tensor, limit: float
) -> None:
    """Sums of squares of both values reach the same weights, and the rate, with the same
    gradients.
    """
    parameters = [*simulator.prefix.parameters(), simulator.inner_lr]
    wanted, given = (
        torch.autograd.grad(value.square().sum(), parameters, allow_unused=True)
        for value in (expected, found)
    )
    for a, b in zip(given, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or error(a, b) < limit
