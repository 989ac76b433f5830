"""Inner rules on a CUDA device, against the CPU in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support.families import FAMILIES
from tests.support.models import on_all_backends
from tests.support.rules import ALONE
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import SIMULATOR, error
from tintc.ir.config import SimulatorConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("backend", ["fused", "none"])
@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("rule", [name for name in ALONE if name != "rms"])
def test_equals_the_cpu(rule: str, steps: int, backend: str) -> None:
    if backend == "none" and rule.startswith("muon"):
        pytest.skip("the transformer back end refuses it")
    config = SimulatorConfig.exact(inner_lr=1e-3, steps=steps, **ALONE[rule])
    shares = () if backend == "fused" else (backend,)
    on_cpu = on_all_backends(FAMILIES["gpt2"].build(), config, shares)[backend]
    inputs = SCENARIOS["padded_left"](3, 11, 29)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    with torch.inference_mode():
        expected, found = on_cpu(**inputs).logits, on_gpu(**inputs).logits
    assert found.is_cuda
    assert error(found.cpu(), expected) < SIMULATOR[torch.float64]
