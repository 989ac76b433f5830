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

import tintc
from tests.support.flops import counting
from tests.support.grid import grid
from tests.support.models import FAMILIES, opt, simulate, tokens
from tintc.compiler import cost
from tintc.compiler.cost import Cost, estimate
from tintc.ir.calibration import fixed
from tintc.ir.config import SimulatorConfig
from tintc.passes.specializing import OPTIMIZATION_NAMES
from tintc.runtime import slices
from tintc.runtime.backends.transformer.structure import BACKENDS
from tintc.runtime.simulator import Simulator

# torch counts no products of oneDNN and not those of its fused attention on a CPU, which are turned
# off where it counts.
COUNTED = tuple(
    name for name in OPTIMIZATION_NAMES if name not in ("onednn_products", "flash_attention")
)
# of the measured peak, on models whose masks and positions are not small beside their activations
PEAK = 0.03

CONFIGS = {
    "paper": SimulatorConfig.paper(),
    "exact": SimulatorConfig.exact(),
    "paper, 3 steps": SimulatorConfig.paper(steps=3),
    "exact, 3 steps, top block": SimulatorConfig.exact(steps=3, layers=1),
    "mean embedding": SimulatorConfig.paper(loss_gradient="mean_embedding"),
    "quadratic, top block": SimulatorConfig.paper(loss_gradient="quadratic", layers=1),
}
# Unrolled and in a loop: factors or own weights, states, products of an orthogonal step.
RULED = {
    "momentum": SimulatorConfig.exact(steps=3, momentum=0.9, clip_norm=0.5),
    "drift": SimulatorConfig.exact(steps=2, max_drift=0.01, decay=0.1),
    "loop": SimulatorConfig.exact(steps=6),
    "loop with momentum": SimulatorConfig.exact(steps=7, momentum=0.9, layers=1),
    "loop with adam": SimulatorConfig.exact(steps=5, optimizer="adam"),
    "muon": SimulatorConfig.exact(steps=2, optimizer="muon", layers=1),
}
# (batch, tokens, trained tokens, dtype, sizes): what is largest differs: attention, feed-forward
# layers, logits.
SHAPES: dict[str, tuple[int, int, int, torch.dtype, dict[str, int]]] = {
    "long": (
        1,
        256,
        128,
        torch.float32,
        {"hidden": 64, "heads": 4, "ffn": 256, "vocab": 1000, "layers": 3},
    ),
    "small vocabulary": (
        3,
        64,
        64,
        torch.float64,
        {"hidden": 48, "heads": 3, "ffn": 100, "vocab": 50, "layers": 2},
    ),
    "large vocabulary, half": (
        2,
        128,
        32,
        torch.bfloat16,
        {"hidden": 32, "heads": 2, "ffn": 128, "vocab": 3000, "layers": 4},
    ),
}


def prepared(
    family: str, config: SimulatorConfig, shape: str, backend: str
) -> tuple[Simulator, dict[str, Any], Tensor, Tensor]:
    """(simulator, arguments of `estimate`, token ids, train mask)."""
    batch, length, trained, dtype, sizes = SHAPES[shape]
    fused = simulate(FAMILIES[family](positions=256, dtype=dtype, **sizes), config)
    simulator = Simulator(
        fused.program, fused.prefix.tensors(), backend=backend, optimize=COUNTED
    ).requires_grad_(False)
    train_mask = (torch.arange(length) < trained).long().expand(batch, length)
    # The last position that carries loss is the one before the last trained token.
    sizes_ = {"batch": batch, "tokens": length, "segment": trained - 1}
    return simulator, sizes_, tokens(batch, length, simulator.program.facts.vocab_size), train_mask


def cost_of(simulator: Simulator, **sizes: int) -> Cost:
    return estimate(
        simulator.program,
        simulator.backend,
        simulator.dtype,
        optimize=simulator.optimizations,
        **sizes,
    )


# OPT in every way; GPT-2 differs in its activation and in the shape of its products.
CASES = [("opt", config) for config in CONFIGS] + [
    ("gpt2", "paper"),
    ("gpt2", "exact, 3 steps, top block"),
]


@grid(case=CASES, shape=SHAPES, backend=BACKENDS)
def test_estimates(case: tuple[str, str], shape: str, backend: str) -> None:
    family, config = case
    simulator, sizes, ids, train_mask = prepared(family, CONFIGS[config], shape, backend)
    # torch does not count its fused attention on a CPU; the plain one is counted as the products
    # that it is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting() as counter:
        simulator(ids, train_mask)
    with torch.no_grad(), measured() as live:
        simulator(ids, train_mask)
    cost = cost_of(simulator, **sizes)
    assert cost.flops == counter.get_total_flops()
    assert abs(cost.peak_bytes / live.peak - 1) < PEAK, (
        f"estimated {cost.peak_bytes}, measured {live.peak}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["long", "small vocabulary"])
@pytest.mark.parametrize("rule", RULED)
def test_estimates_of_inner_rules(rule: str, shape: str) -> None:
    simulator, sizes, ids, train_mask = prepared("opt", RULED[rule], shape, "fused")
    with torch.no_grad():
        simulator(ids, train_mask)  # what weights are turned into once is part of no call
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting() as counter:
        simulator(ids, train_mask)
    with torch.no_grad(), measured() as live:
        simulator(ids, train_mask)
    cost = cost_of(simulator, **sizes)
    assert cost.flops == counter.get_total_flops()
    assert abs(cost.peak_bytes / live.peak - 1) < PEAK


@pytest.mark.slow
def test_a_loop_on_the_transformer_back_end() -> None:
    """Each step costs as much; memory does not grow with them."""
    costs = {}
    for steps in (5, 6, 205):
        config = SimulatorConfig.paper(steps=steps)
        simulator, sizes, ids, train_mask = prepared(
            "opt", config, "small vocabulary", "transformer"
        )
        costs[steps] = cost_of(simulator, **sizes)
        if steps == 6:
            counter = counting()
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
                simulator(ids, train_mask)
            assert costs[steps].flops == counter.get_total_flops()
    one = costs[6].flops - costs[5].flops
    assert costs[205].flops == costs[5].flops + 200 * one
    assert costs[205].peak_bytes == costs[5].peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("config", ["paper", "exact", "paper, 3 steps"])
def test_estimates_without_optimizations(config: str) -> None:
    simulator, sizes, ids, train_mask = prepared("opt", CONFIGS[config], "long", "fused")
    simulator.optimizations = ()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting() as counter:
        simulator(ids, train_mask)
    with torch.no_grad(), measured() as live:
        simulator(ids, train_mask)
    cost = cost_of(simulator, **sizes)
    assert cost.flops == counter.get_total_flops()
    assert abs(cost.peak_bytes / live.peak - 1) < PEAK


def test_the_fused_way_back() -> None:
    """torch's kernel makes the same five products as the attention that is written out, and holds
    less, where all tokens are trained on.
    """
    simulator, sizes, ids, train_mask = prepared(
        "opt", CONFIGS["exact"], "small vocabulary", "fused"
    )
    plain = cost_of(simulator, **sizes)
    simulator.optimizations = (*COUNTED, "flash_attention")
    flash = cost_of(simulator, **sizes)
    assert flash.flops == plain.flops
    assert flash.peak_bytes < plain.peak_bytes
    with torch.no_grad(), measured() as live:
        simulator(ids, train_mask)
    assert abs(flash.peak_bytes / live.peak - 1) < PEAK


@pytest.mark.slow
def test_names_of_optimizations() -> None:
    """All, none or some; oneDNN changes no cost."""
    program = prepared("opt", CONFIGS["exact"], "long", "fused")[0].program
    sizes = {"batch": 1, "tokens": 64, "segment": 4}  # so few that factors are chosen

    def cost(names: Any) -> Cost:
        return estimate(program, "fused", torch.float32, optimize=names, **sizes)

    without = tuple(name for name in OPTIMIZATION_NAMES if name != "onednn_products")
    assert cost(True) == cost(OPTIMIZATION_NAMES) == cost(without)
    assert cost(False) == cost(()) == cost(("onednn_products",)) != cost(True)
    assert cost(("low_rank_updates",)).flops == cost(True).flops != cost(False).flops
    with pytest.raises(tintc.UsageError, match="there is no optimization nonsense"):
        cost(("nonsense",))


# Slices of 4, 4; of 3, 2; of 3, 3, 3, 2.
@pytest.mark.parametrize("batch", [8, 5, 11])
@pytest.mark.parametrize("config", ["paper", "exact, 3 steps, top block"])
def test_a_batch_in_slices(config: str, batch: int) -> None:
    simulator, sizes, *_ = prepared("opt", CONFIGS[config], "small vocabulary", "fused")
    length, vocab = 128, simulator.program.facts.vocab_size
    ids, train_mask = (
        tokens(batch, length, vocab),
        (torch.arange(length) < 64).long().expand(batch, length),
    )
    sizes = {"batch": batch, "tokens": length, "segment": 63}
    assert slices.slice_size(batch, slices.Work(length), fixed("cpu")) < batch
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting() as counter:
        simulator(ids, train_mask)
    with torch.no_grad(), measured() as live:
        simulator(ids, train_mask)
    cost = cost_of(simulator, **sizes)
    assert cost.flops == counter.get_total_flops()
    assert abs(cost.peak_bytes / live.peak - 1) < PEAK, (
        f"estimated {cost.peak_bytes}, measured {live.peak}"
    )
    in_one = estimate(
        simulator.program,
        "fused",
        simulator.dtype,
        optimize=[n for n in COUNTED if n != slices.NAME],
        **sizes,
    )
    assert (in_one.flops, in_one.peak_bytes > cost.peak_bytes) == (cost.flops, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_cost_grows_as_it_should(backend: str) -> None:
    """Steps and trained tokens cost; tokens cost more than linearly by attention; batches are
    nearly linear in FLOPs.
    """

    def cost(config: SimulatorConfig, dtype: torch.dtype = torch.float32, **changes: int) -> Cost:
        program = simulate(opt(layers=3), config).program
        return estimate(
            program, backend, dtype, **{"batch": 1, "tokens": 64, "segment": 32, **changes}
        )

    exact = SimulatorConfig.exact()
    small = cost(exact)
    # The transformer's prefix tokens attend once for all sequences until they are updated.
    assert 2.9 * small.flops < cost(exact, batch=3).flops <= 3 * small.flops
    assert cost(exact, tokens=128, segment=64).flops > 2 * small.flops
    assert cost(exact, segment=64).flops > small.flops
    assert cost(exact, torch.bfloat16).flops == small.flops
    # Own weights are float32 in half precision too: what is smaller is activations.
    assert (
        cost(exact, torch.bfloat16, tokens=512).peak_bytes
        < cost(exact, tokens=512).peak_bytes
        < cost(exact, torch.float64, tokens=512).peak_bytes
    )
    assert cost(SimulatorConfig.exact(steps=2)).flops > 1.3 * small.flops
    fewer = cost(SimulatorConfig.exact(layers=1))
    assert fewer.flops < small.flops
    assert fewer.peak_bytes < small.peak_bytes


def test_nothing_is_computed() -> None:
    """A model whose weights alone would need terabytes is counted on shapes."""
    program = simulate(opt(layers=1), SimulatorConfig.paper()).program
    huge = {"batch": 10**6, "tokens": 16, "segment": 8}
    assert (
        estimate(program, "fused", torch.float64, **huge).peak_bytes > 8 * 10**6 * 16 * 29
    )  # in slices: the logits, and little more
    assert estimate(program, "fused", torch.float64, optimize=False, **huge).peak_bytes > 1e10
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
                self._known.add(
                    argument.untyped_storage()._cdata
                )  # weights and inputs: made outside, or counted already
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


def test_fewer_heads_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.12 torch counted no attention whose keys have fewer heads than its queries."""

    def strict(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
        assert query[1] == key[1] == value[1]
        return torch_count(query, key, value)  # type: ignore[no-any-return, no-untyped-call]

    torch_count = cost.sdpa_flop_count
    monkeypatch.setattr(cost, "sdpa_flop_count", strict)
    query, key = torch.empty(3, 4, 10, 16), torch.empty(3, 2, 10, 16)
    with torch.no_grad(), cost.Meter() as meter:
        torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert meter.flops == 2 * (2 * 3 * 4 * 10 * 10 * 16)
