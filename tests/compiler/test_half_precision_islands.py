"""Islands in half precision: their own weights are in float32 too, beside activations that a GPU
has in the half type.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tintc
from tests.compiler.test_islands import Decoder, V, decoder, feed
from tests.support.grid import grid, some
from tests.support.models import randomized
from tests.support.tolerances import UPDATE_COSINE_HALF, cosine, error
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


@pytest.mark.slow
@some("fine", [torch.float64, torch.complex128], default=[torch.complex128])
def test_a_table_finer_than_the_model(fine: torch.dtype) -> None:
    """Its code rounds what it computes with the table; an island is traced in one type."""

    def turned(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        y = x.unflatten(-1, (-1, 2)).to(fine.to_real()) * m.norm.table.real.abs()[: x.shape[1]]
        return m.out((y.flatten(2).to(x.dtype) @ x.mT).sin().tril() @ x)

    torch.manual_seed(1)
    model = randomized(Decoder(turned, feed)).eval()
    for block in model.blocks:
        table = torch.rand(64, 1, 2, dtype=torch.float64).to(fine)
        block.norm.register_buffer("table", table, persistent=False)
    simulator = tintc.compile(model, tintc.SimulatorConfig.exact(inner_lr=0.05))
    ids = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = simulator(ids, torch.ones_like(ids), return_initial=True)
        assert found.initial_logits is not None
        assert error(found.initial_logits, model(ids)) < 1e-4
