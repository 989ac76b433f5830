"""On a CUDA device: every family on both back ends, against the CPU in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.support.families import FAMILIES
from tests.support.models import on_all_backends, simulate
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import HALF_LOGITS, SIMULATOR, error
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PRESETS = ("paper", "exact")
BACKENDS = ("fused", "none")
LIMITS = {**SIMULATOR, **HALF_LOGITS}


def _simulator(family: str, preset: str, backend: str) -> Simulator:
    config = SimulatorConfig.preset(preset, inner_lr=0.01, steps=2)
    shares = () if backend == "fused" else (backend,)
    model = FAMILIES[family].build().double()
    return on_all_backends(model, config, shares)[backend]


def _called(simulator: Simulator, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode():
        found = simulator(**inputs, labels=inputs["input_ids"], return_initial=True)
    return {name: getattr(found, name) for name in ("logits", "initial_logits", "loss")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_cpu(family: str, preset: str, backend: str) -> None:
    on_cpu = _simulator(family, preset, backend)
    inputs = SCENARIOS["padded_left"](3, 11, 29)
    expected = _called(on_cpu, inputs)
    for dtype in (torch.float64, torch.float32):
        on_gpu = copy.deepcopy(on_cpu).to("cuda", dtype)
        found = _called(on_gpu, inputs)  # inputs move by themselves
        for name, value in expected.items():
            assert found[name].is_cuda
            assert error(found[name].cpu().double(), value) < LIMITS[dtype], (dtype, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    on_cpu = _simulator(family, "exact", "fused")
    inputs = SCENARIOS["ragged"](3, 11, 29)
    found = _called(copy.deepcopy(on_cpu).to("cuda", dtype), inputs)["logits"]
    assert error(found.cpu().double(), _called(on_cpu, inputs)["logits"]) < LIMITS[dtype]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimized", [True, False])
def test_updates_and_outer_gradients(preset: str, optimized: bool) -> None:
    on_cpu = _simulator("gpt2", preset, "fused")
    on_cpu.optimizations = optimized  # type: ignore[assignment]  # the setter takes more than the getter gives
    on_gpu = copy.deepcopy(on_cpu).cuda()
    inputs = SCENARIOS["blocks"](3, 11, 29)
    for simulator in (on_cpu, on_gpu):
        simulator(**inputs, labels=inputs["input_ids"]).loss.backward()
    slopes = [simulator.inner_lr.grad for simulator in (on_cpu, on_gpu)]
    assert slopes[0] is not None and slopes[1] is not None
    assert error(slopes[1].cpu(), slopes[0]) < LIMITS[torch.float64]
    updates = [simulator.updates(**inputs) for simulator in (on_cpu, on_gpu)]
    assert updates[0] and updates[0].keys() == updates[1].keys()
    for slot, value in updates[0].items():
        assert error(updates[1][slot].cpu(), value) < LIMITS[torch.float64], slot


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode: str) -> None:
    config = SimulatorConfig.exact(inner_lr=0.01, steps=2)
    simulator = simulate(FAMILIES["gpt2"].build(), config, torch_compile=mode)
    simulator = simulator.to("cuda", torch.float32)
    inputs = {name: value.cuda() for name, value in SCENARIOS["ragged"](3, 11, 29).items()}
    expected = _called(_simulator("gpt2", "exact", "fused"), inputs)["logits"].cpu().double()
    for _ in range(3):  # CUDA graphs are recorded at the second call and replayed at the third
        found = _called(simulator, inputs)["logits"].cpu().double()
        assert error(found, expected) < LIMITS[torch.float32]
