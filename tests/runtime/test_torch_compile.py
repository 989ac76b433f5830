"""torch.compile of programs with oneDNN's products, on a CPU."""

import pytest
import torch

from tests.support.models import opt, simulate
from tests.support.tolerances import OPTIMIZED, error
from tintc.evaluate.speed.workload import random_workload
from tintc.evaluate.speed.workload import simulate as call
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.ops.onednn import available, onednn_descent, onednn_product
from tintc.runtime.compilers import check_compiler


def has_compiler() -> bool:
    try:
        check_compiler("cpu")
    except UsageError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
needs_onednn = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")


def test_stay_on() -> None:
    simulator = simulate(opt(dtype=torch.float32), SimulatorConfig.paper())
    simulator.optimize(True, "default")
    assert "onednn_products" in simulator.optimizations


@needs_onednn
def test_products_are_traced() -> None:
    """Whole, without a break: torch.compile sees each as one call with a known shape."""

    def program(x: torch.Tensor, weight: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        y = onednn_product(x, weight, None, None, False)
        return onednn_product(x, onednn_descent(weight, y, x, rate), None, y, False)

    args = (torch.randn(2, 5, 3), torch.randn(4, 3), torch.tensor(0.1, dtype=torch.float64))
    compiled = torch.compile(program, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert error(compiled(*args), program(*args)) < OPTIMIZED[torch.float32]


@needs_compiler
@needs_onednn
@pytest.mark.slow  # a minute of C++
def test_a_simulator() -> None:
    simulator = simulate(opt(dtype=torch.float32), SimulatorConfig.exact(inner_lr=0.01))
    work = random_workload(29, batch=2, tokens=11, trained=7)
    expected = call(simulator, work)
    simulator.optimize(True, "default")
    assert "onednn" in simulator.emitted(differentiable=False).code
    assert error(call(simulator, work), expected) < OPTIMIZED[torch.float32]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    simulator = simulate(opt(dtype=torch.float32), SimulatorConfig.paper())
    simulator.optimize(True, "default")
    with pytest.raises(UsageError, match="install one"):
        call(simulator, random_workload(29, batch=1, tokens=11, trained=7))
