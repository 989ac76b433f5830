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

from tests.models import FAMILIES, opt, simulate, tokens
from tintc.compiler.config import SimulatorConfig
from tintc.compiler.cost import estimate
from tintc.runtime.simulator import Simulator

PEAK = 0.15  # of the measured peak; the estimate leaves out masks, positions and small temporaries

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


def prepared(family: str, config: SimulatorConfig, shape: str) -> tuple[Simulator, dict[str, Any], Tensor, Tensor]:
    """(simulator, arguments of `estimate`, token ids, train mask)."""
    batch, length, trained, dtype, sizes = SHAPES[shape]
    simulator = simulate(FAMILIES[family](positions=256, dtype=dtype, **sizes), config).requires_grad_(False)
    train_mask = (torch.arange(length) < trained).long().expand(batch, length)
    # The last position that carries loss is the one before the last trained token.
    sizes_ = {"batch": batch, "tokens": length, "segment": trained - 1, "bytes_per_number": dtype.itemsize}
    return simulator, sizes_, tokens(batch, length, simulator.program.facts.vocab_size), train_mask


# OPT in every way; GPT-2 differs in its activation and in the shape of its products.
CASES = [("opt", config) for config in CONFIGS] + [("gpt2", "paper"), ("gpt2", "exact, 3 steps, top block")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("family", "config"), CASES)
def test_estimates(family: str, config: str, shape: str) -> None:
    simulator, sizes, ids, train_mask = prepared(family, CONFIGS[config], shape)
    # torch does not count its fused attention on a CPU; the plain one is counted as the products that it is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        simulator(ids, train_mask)
    with torch.no_grad(), measured() as live:
        simulator(ids, train_mask)
    cost = estimate(simulator.program.graph, **sizes)
    assert cost.flops == counter.get_total_flops()
    assert cost.weight_bytes == sum(p.numel() * p.element_size() for p in simulator.prefix.parameters())
    work = cost.peak_bytes - cost.weight_bytes
    assert abs(work / live.peak - 1) < PEAK, f"estimated {work}, measured {live.peak}"


def test_cost_grows_as_it_should() -> None:
    """Steps and trained tokens cost; tokens cost more than linearly by attention; batches are linear in FLOPs."""
    graph = simulate(opt(layers=3), SimulatorConfig.exact()).program.graph
    base = {"batch": 1, "tokens": 64, "segment": 32, "bytes_per_number": 4}
    small = estimate(graph, **base)
    assert estimate(graph, **{**base, "batch": 3}).flops == 3 * small.flops
    assert estimate(graph, **{**base, "tokens": 128, "segment": 64}).flops > 2 * small.flops
    assert estimate(graph, **{**base, "segment": 64}).flops > small.flops
    assert estimate(graph, **{**base, "bytes_per_number": 8}).peak_bytes == 2 * small.peak_bytes
    more = estimate(simulate(opt(layers=3), SimulatorConfig.exact(steps=2)).program.graph, **base)
    assert more.flops > 1.3 * small.flops
    assert more.weight_bytes == small.weight_bytes
    fewer = estimate(simulate(opt(layers=3), SimulatorConfig.exact(layers=1)).program.graph, **base)
    assert fewer.flops < small.flops
    assert fewer.peak_bytes < small.peak_bytes


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
