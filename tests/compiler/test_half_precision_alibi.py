"""ALiBi in half precision over a thousand tokens: far positions have large biases, and only their
differences count.
"""

from __future__ import annotations

import copy

import pytest
import torch

import tintc
from tests.support.families import LAYERS, VOCAB, builder
from tests.support.models import tokens
from tintc.ir.config import SimulatorConfig

LENGTH = 1000
SIZES = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": LAYERS,
    "max_seq_len": LENGTH,
    "expansion_ratio": 2,
}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square error over the second half, relative to the expected values'."""
    late = slice(LENGTH // 2, None)
    return float((found.double() - expected)[:, late].norm() / expected[:, late].norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("converted", [False, True], ids=["compiled so", "converted"])
def test_far_positions_keep_their_differences(dtype: torch.dtype, converted: bool) -> None:
    model = builder("mpt", **SIZES)(dtype)
    ids = tokens(1, LENGTH, VOCAB)
    simulator = tintc.compile(
        copy.deepcopy(model).float() if converted else model, SimulatorConfig.paper()
    ).to(dtype)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(ids).logits
        own, found = model(ids).logits, simulator.predict_initial(ids)
        trained = simulator(ids, (torch.arange(LENGTH) < LENGTH // 2).long()[None]).logits
    assert found.dtype == dtype
    assert relative(found, exact) < 1.5 * relative(own, exact)
    assert bool(trained.isfinite().all())
