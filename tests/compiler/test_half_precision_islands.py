"""Islands in half precision: their own weights are in float32 too, beside activations that a GPU
has in the half type.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import tintc
from tests.compiler.test_islands import V, decoder
from tests.support.grid import grid
from tests.support.tolerances import UPDATE_COSINE_HALF, cosine
from tintc.runtime.specialize import programs

KINDS = {
    "weights": ("attend", "weights of heads"),
    "ids": ("feed", "by token"),
    "table": ("embed", "token type"),
}
STEPS = tintc.SimulatorConfig.exact(inner_lr=1e-5, steps=2)


def changes(simulator: tintc.Simulator) -> Tensor:
    """What one sequence's training has changed, of all weights in one vector, in float64."""
    ids = torch.randint(V, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        after = simulator.updated_state_dict(ids, (torch.arange(12) < 8).long()[None])
    before = simulator.prefix.tensors()
    names = [name for name in before if name in after]
    return torch.cat([(after[n].double() - before[n].double()).flatten() for n in names])


@grid(kind=KINDS, dtype=[torch.bfloat16, torch.float16], in_half=[False, True])
def test_small_steps_are_those_of_float64(
    kind: str, dtype: torch.dtype, in_half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = tintc.compile(decoder(*KINDS[kind]), STEPS, check="none").to(dtype)
    high = copy.deepcopy(low).double()
    if in_half:  # as other devices than a CPU compute
        monkeypatch.setattr(programs, "computed_dtype", lambda stored, device: stored)
    found, expected = changes(low), changes(high)
    assert float(expected.norm()) > 0
    assert cosine(found, expected) >= UPDATE_COSINE_HALF
    assert abs(float(found.norm() / expected.norm()) - 1) < 0.03
