"""Estimates against what torch counts: FLOPs exactly, peak memory within a stated tolerance."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import tintc
from tests.models import FAMILIES, opt, simulate, tokens
from tintc.compiler.config import SimulatorConfig
from tintc.compiler.cost import Cost, estimate
from tintc.runtime.simulator import Simulator
from tintc.runtime.structure import BACKENDS

PEAK = 0.03  # of the measured peak, on models whose masks and positions are not small beside their activations

CONFIGS = {
    "paper": SimulatorConfig.paper(),
    "exact": SimulatorConfig.exact(),
    "paper, 3 steps": SimulatorConfig.paper(steps=3),
    "exact, 3 steps, top block": SimulatorConfig.exact(steps=3, layers=1),
    "mean embedding": SimulatorConfig.paper(loss_gradient="mean_embedding"),
    "quadratic, top block": SimulatorConfig.paper(loss_gradient="quadratic", layers=1),
}
# (batch, tokens, trained tokens, dtype, sizes): what is largest differs: attention, feed-forward layers, logits.
SHAPES: dict[str, tuple[int, int, int, torch.dtype, dict[str, int]]] = {
    "long": (1, 256, 128, torch.float32, {"hidden": 64, "heads": 4, "ffn": 256, "vocab": 1000, "layers": 3}),
    "small vocabulary": (3, 64, 64, torch.float64, {"hidden": 48, "heads": 3, "ffn": 100, "vocab": 50, "layers": 2}),
    "large vocabulary, half": (2, 128, 32, torch.bfloat16, {"hidden": 32, "heads": 2, "ffn": 128, "vocab": 3000, "layers": 4}),
}


def prepared(family: str, config: SimulatorConfig, shape: str, backend: str) -> tuple[Simulator, dict[str, Any], Tensor, Tensor]:
    """(simulator, arguments of `estimate`, token ids, train mask)."""
    batch, length, trained, dtype, sizes = SHAPES[shape]
    fused = simulate(FAMILIES[family](positions=256, dtype=dtype, **sizes), config)
    simulator = Simulator(fused.program, fused.prefix.tensors(), backend=backend).requires_grad_(False)
    train_mask = (torch.arange(length) < trained).long().expand(batch, length)
    # The last position that carries loss is the one before the last trained token.
    sizes_ = {"batch": batch, "tokens": length, "segment": trained - 1}
    return simulator, sizes_, tokens(batch, length, simulator.program.facts.vocab_size), train_mask


def cost_of(simulator: Simulator, **sizes: int) -> Cost:
    return estimate(simulator.program, simulator.backend, simulator.dtype, **sizes)


# OPT in every way; GPT-2 differs in its activation and in the shape of its products.
CASES = [("opt", config) for config in CONFIGS] + [("gpt2", "paper"), ("gpt2", "exact, 3 steps, top block")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("family", "config"), CASES)
def test_estimates(family: str, config: str, shape: str, backend: str) -> None:
    simulator, sizes, ids, train_mask = prepared(family, CONFIGS[config], shape, backend)
    # torch does not count its fused attention on a CPU; the plain one is counted as the products that it is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        simulator(ids, train_mask)
    with torch.no_grad(), measured() as live:
        simulator(ids, train_mask)
    cost = cost_of(simulator, **sizes)
    assert cost.flops == counter.get_total_flops()
    assert abs(cost.peak_bytes / live.peak - 1) < PEAK, f"estimated {cost.peak_bytes}, measured {live.peak}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_cost_grows_as_it_should(backend: str) -> None:
    """Steps and trained tokens cost; tokens cost more than linearly by attention; batches are nearly linear in FLOPs."""

    def cost(config: SimulatorConfig, dtype: torch.dtype = torch.float32, **changes: int) -> Cost:
        program = simulate(opt(layers=3), config).program
        return estimate(program, backend, dtype, **{"batch": 1, "tokens": 64, "segment": 32, **changes})

    exact = SimulatorConfig.exact()
    small = cost(exact)
    # The transformer's prefix tokens attend once for all sequences until they are updated.
    assert 2.9 * small.flops < cost(exact, batch=3).flops <= 3 * small.flops
    assert cost(exact, tokens=128, segment=64).flops > 2 * small.flops
    assert cost(exact, segment=64).flops > small.flops
    assert cost(exact, torch.bfloat16).flops == small.flops
    assert cost(exact, torch.bfloat16).peak_bytes < small.peak_bytes < cost(exact, torch.float64).peak_bytes
    assert cost(SimulatorConfig.exact(steps=2)).flops > 1.3 * small.flops
    fewer = cost(SimulatorConfig.exact(layers=1))
    assert fewer.flops < small.flops
    assert fewer.peak_bytes < small.peak_bytes


def test_nothing_is_computed() -> None:
    """A model whose weights alone would need terabytes is counted on shapes."""
    program = simulate(opt(layers=1), SimulatorConfig.paper()).program
    huge = {"batch": 10**6, "tokens": 16, "segment": 8}
    assert estimate(program, "fused", torch.float64, **huge).peak_bytes > 1e10
    assert estimate(program, "transformer", torch.float64, **huge).peak_bytes > 1e10


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_opt_125m(backend: str) -> None:
    simulator = tintc.compile("shape:opt-125m", backend=backend).requires_grad_(False)
    ids, train_mask = tokens(1, 256, 50272), (torch.arange(256) < 128).long()[None]
    with torch.no_grad(), measured() as live:
        simulator(ids, train_mask)
    cost = cost_of(simulator, batch=1, tokens=256, segment=127)
    assert abs(cost.peak_bytes / live.peak - 1) < 0.01


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made under this mode that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in tree_leaves((args, kwargs)):
            if isinstance(argument, Tensor):
                self._known.add(argument.untyped_storage()._cdata)  # weights and inputs: made outside, or counted already
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)


@contextmanager
def measured() -> Iterator[LiveBytes]:
    with LiveBytes() as live:
        yield live
