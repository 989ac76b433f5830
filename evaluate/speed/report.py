"""What `tintc bench` prints: a simulator's time and memory beside those of a hand-written autograd
loop, and whether both agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from tintc.compiler.artifact_writer import save
from tintc.compiler.autograd_rule import matrices, rule_of
from tintc.compiler.cost import estimate
from tintc.compiler.driver import compile as compile_model
from tintc.compiler.gradient_statistics import chosen_statistics
from tintc.compiler.reports.direct import direct_flops
from tintc.evaluate.speed import benchmark, exported
from tintc.evaluate.speed import memory as bench_memory
from tintc.evaluate.speed.agreement import check, check_kernels
from tintc.evaluate.speed.benchmark import in_turn, variant
from tintc.evaluate.speed.kernels import counted_products, simulator_kernels, use_kernels
from tintc.evaluate.speed.placed import Placed, Progress
from tintc.evaluate.speed.products import product_facts
from tintc.evaluate.speed.rivals import KINDS, Rival, check_rival, loop_against
from tintc.evaluate.speed.settings import Against, Kernels, Options
from tintc.evaluate.speed.workload import Workload, random_workload, simulate
from tintc.ir.call_sizes import CallSizes, Predict, call_sizes, trained_tokens
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError, UsageError
from tintc.ir.facts import ModelFacts
from tintc.ir.precision import dtype_name
from tintc.passes.specializing import OPTIMIZATION_NAMES
from tintc.runtime.backends.transformer.structure import check_backend
from tintc.runtime.machine import timed
from tintc.runtime.simulator import Simulator
from tintc.runtime.slices import read_memory

AGAINST: tuple[str, ...] = get_args(Against)
KERNELS: tuple[str, ...] = get_args(Kernels)
PREDICT: tuple[str, ...] = get_args(Predict)
NOTHING = "none"  # the row of --each in which every optimization is off
_CHECKED = 2  # sequences of the check


@dataclass(frozen=True)
class Settings(Options, Placed):
    """What is measured, and where."""

    @property
    def optimizations(self) -> tuple[str, ...]:
        """Names of those that are on."""
        return tuple(name for name in OPTIMIZATION_NAMES if name not in self.without)

    def check(self) -> None:
        """Raises UsageError for what no model can have."""
        check_backend(self.backend, self.share)
        if self.against not in AGAINST:
            raise UsageError(f"against is {self.against!r}; expected {', '.join(AGAINST)}")
        if self.kernels not in KERNELS:
            raise UsageError(f"kernels is {self.kernels!r}; expected {', '.join(KERNELS)}")
        if self.kernels == "same" and not KINDS[self.against].kernels:
            takes = ", ".join(name for name, kind in KINDS.items() if kind.kernels)
            raise UsageError(
                f"kernels=same is for a loop that multiplies by torch.matmul; got against "
                f"{self.against}: expected {takes}"
            )
        if self.predict not in PREDICT:
            raise UsageError(f"predict is {self.predict!r}; expected {' or '.join(PREDICT)}")
        if self.predict == "rest" and self.against == "onnxruntime":
            raise UsageError("an exported simulator gives all logits; expected predict all")
        self.check_counts("pairs")
        read_memory(self.slice_memory)
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; expected a whole number from 0 to 2^63 - 1")
        unknown = [name for name in self.without if name not in OPTIMIZATION_NAMES]
        if unknown:
            raise UsageError(
                f"there is no optimization {', '.join(unknown)}; they are "
                f"{', '.join(OPTIMIZATION_NAMES)}"
            )
        if self.backend == "transformer" and (self.each or self.without):
            raise UsageError(
                "the transformer back end has no optimizations; leave without and each out"
            )
        if self.each and not self.optimizations:
            raise UsageError("each=True needs an optimization that is on; without switches all off")
        self.sizes(ModelFacts())

    def sizes(self, facts: ModelFacts) -> dict[str, int]:
        """batch, tokens and trained tokens of a call. Raises UsageError for a length that the model
        cannot have.
        """
        sizes = self.counted(facts)
        trained = trained_tokens(sizes["tokens"], self.train_fraction)
        if trained < 2:
            raise UsageError(
                f"{trained} of {sizes['tokens']} tokens is trained; expected at least 2: pass more "
                "tokens or a larger train_fraction"
            )
        return {"batch": sizes["batch"], "tokens": sizes["tokens"], "trained": trained}

    def counted(self, facts: ModelFacts) -> CallSizes:
        """The same, as costs are told for."""
        return call_sizes(
            facts, batch=self.batch, tokens=self.tokens, train_fraction=self.train_fraction
        )


def stages(settings: Settings) -> int:
    """Calls of `progress`."""
    # load, compile, check, warm-up, each pair, matrix products; two processes; and for --each a
    # warm-up and the pairs of every row
    rows = len(settings.optimizations) + 1 if settings.each else 0
    return 5 + settings.pairs + (2 if settings.memory else 0) + rows * (settings.pairs + 1)


def bench_report(
    source: str,
    config: SimulatorConfig,
    settings: Settings,
    *,
    progress: Progress = lambda stage: None,
) -> dict[str, Any]:
    """Seconds, bytes and differences of one simulator and of what it is timed against
    (`rivals.py`; the loop that `benchmark.HandWrittenLoop` describes), as JSON values.

    Both run on the same random tokens, in turn, the simulator under torch.inference_mode; `ratio`
    is the median of simulator / loop, pair by pair. flops: of one call of the simulator, as
    `tintc cost` counts them with all optimizations, or with none if all are off.
    first_call_seconds: of a call before all others, in which programs are made and compiled.

    Raises SourceError, UnsupportedModelError, UsageError, MemoryLimitError; and NumericalError
    where optimizations change the result, or where a simulator without approximation does not agree
    with the loop.
    """
    settings.check()
    check_rival(settings.against, config, settings.device)
    statistics = chosen_statistics(source, settings.statistics, config)
    model = settings.load(source, config, settings.seed, progress)
    progress("compile")
    how: dict[str, Any] = {
        "optimize": settings.optimizations,
        "torch_compile": settings.torch_compile,
        "memory": settings.slice_memory,
        "statistics": statistics,
    }
    simulator = compile_model(model, config, backend=settings.backend, share=settings.share, **how)
    sizes = settings.sizes(simulator.program.facts)
    names = benchmark.updated_parameters(simulator)
    memory = (
        _memory(source, simulator, settings, sizes, names, progress) if settings.memory else None
    )
    simulator, model = simulator.to(settings.device), model.to(settings.device)
    enough = {**sizes, "batch": max(sizes["batch"], _CHECKED)}
    work = random_workload(
        simulator.program.facts.vocab_size, **enough, seed=settings.seed, predict=settings.predict
    ).to(settings.device)
    checked, work = work.few(_CHECKED), work.few(sizes["batch"])
    progress("check")
    rival, products = _rival(simulator, model, names, settings, checked)
    first = {
        "loop": timed(lambda: rival(work), settings.device),
        "simulator": timed(lambda: simulate(simulator, work), settings.device),
    }
    checks = check(simulator, rival, checked, KINDS[settings.against])
    progress("warm up")
    turns = in_turn(
        lambda: rival(work),
        lambda: simulate(simulator, work),
        pairs=settings.pairs,
        device=settings.device,
        on_pair=lambda pair: progress(f"pair {pair + 1} of {settings.pairs}"),
    )
    timings = turns.to_dict("loop", "simulator")
    progress("matrix products")
    counted = settings.counted(simulator.program.facts)
    return {
        "source": source,
        **_facts(simulator, settings, sizes, names),
        **timings,
        "first_call_seconds": first,
        "throughput": _throughput(simulator, settings, counted, timings["simulator_seconds"]),
        "choices": simulator.chosen(counted) if settings.backend == "fused" else None,
        "products": product_facts(
            lambda: simulate(simulator, work),
            timings["simulator_seconds"],
            settings.device,
            settings.dtype,
        ),
        "memory": memory,
        "loop_products": products.facts if products else None,
        "checks": [*checks, *([products.check] if products else [])],
        "each": _each(simulator, work, settings, progress) if settings.each else None,
    }


class _Products(NamedTuple):
    """Of a loop on the simulator's kernels. facts: FLOPs of one sequence, and the share of them in
    linear layers that run on these kernels. check: it beside itself on its own kernels.
    """

    facts: dict[str, float]
    check: dict[str, Any]


def _rival(
    simulator: Simulator,
    model: nn.Module,
    names: Sequence[str],
    settings: Settings,
    checked: Workload,
) -> tuple[Rival, _Products | None]:
    """What the simulator is timed against. Raises NumericalError where other kernels change what
    a loop computes.
    """
    if settings.against == "onnxruntime":
        return exported.OnnxRuntime.of(simulator), None
    loop = loop_against(settings.against, model, names, rule_of(simulator))
    chosen = simulator_kernels(simulator) if settings.kernels == "same" else None
    if chosen is None:
        return loop, None
    one = checked.few(1)
    own, before = loop(checked), counted_products(lambda: loop(one))
    use_kernels(model, chosen)
    found, after = loop(checked), counted_products(lambda: loop(one))
    if after["all"] != before["all"]:
        raise NumericalError(
            f"the loop has {after['all']:,} FLOPs on the simulator's kernels and "
            f"{before['all']:,} on its own; expected as many"
        )
    taken, left = after["replaced"], after["linear"]
    share = taken / (taken + left) if taken + left else 0.0
    facts = {"flops": after["all"], "same_kernels": share}
    return loop, _Products(facts, check_kernels(simulator, checked, found, own))


def _facts(
    simulator: Simulator, settings: Settings, sizes: dict[str, int], names: Sequence[str]
) -> dict[str, Any]:
    """Every setting, and where it ran."""
    return {
        "against": settings.against,
        "kernels": settings.kernels,
        "config": simulator.config.to_dict(),
        "rule": simulator.config.rule,
        "exact": simulator.config.is_exact,
        "backend": settings.backend,
        "share": settings.share,
        "optimizations": list(simulator.optimizations),
        "without": list(settings.without),
        "torch_compile": settings.torch_compile,
        "slice_memory": settings.slice_memory,
        "batch": sizes["batch"],
        "tokens": sizes["tokens"],
        "trained_tokens": sizes["trained"],
        "train_fraction": settings.train_fraction,
        "predict": settings.predict,
        "pairs": settings.pairs,
        "seed": settings.seed,
        **settings.where(),
        "simulator_parameters": sum(parameter.numel() for parameter in simulator.parameters()),
        "trained_parameters": list(names),
    }


def _memory(
    source: str,
    simulator: Simulator,
    settings: Settings,
    sizes: dict[str, int],
    names: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Peak bytes of both sides. ratio: simulator / loop of the whole processes; call_ratio: of the
    calls alone.
    """
    asked = {
        "source": source,
        "options": {**settings.options, "seed": settings.seed},
        "config": simulator.config.to_dict(),
        "matrices": matrices(simulator),
        "aliases": dict(simulator.program.aliases),
        "optimize": settings.optimizations,
        "torch_compile": settings.torch_compile,
        "slice_memory": settings.slice_memory,
        "dtype": dtype_name(settings.dtype),
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "vocab_size": simulator.program.facts.vocab_size,
        "seed": settings.seed,
        "names": list(names),
        "against": settings.against,
        "kernels": settings.kernels,
        "predict": settings.predict,
        **sizes,
    }
    found: dict[str, Any] = {"how": bench_memory.how_measured(settings.device)}
    with tempfile.TemporaryDirectory(prefix="tintc-bench-") as folder:
        artifact = save(simulator, Path(folder) / "simulator")
        if settings.against == "onnxruntime":
            asked["onnx"] = str(exported.write(simulator, Path(folder)))
        for side in bench_memory.SIDES:
            progress(f"memory of the {side}")
            found[side] = bench_memory.measure(side, {**asked, "artifact": str(artifact)})
    peaks, calls = (
        [found[side][name] for side in ("simulator", "loop")]
        for name in ("peak_bytes", "call_peak_bytes")
    )
    return {
        **found,
        "ratio": peaks[0] / peaks[1],
        "call_ratio": None if None in calls else calls[0] / calls[1],
    }


def _throughput(
    simulator: Simulator, settings: Settings, sizes: CallSizes, seconds: float
) -> dict[str, Any]:
    """FLOPs of a call over its median time, beside what large square products reach here, and the
    FLOPs of direct fine-tuning by exact gradients.
    """
    flops = estimate(
        simulator.program,
        settings.backend,
        settings.dtype,
        **sizes,
        optimize=bool(settings.optimizations),
        predict=settings.predict,
    ).flops
    rates = benchmark.matmul_rates(settings.dtype, settings.device)
    peak = max(rates.values())
    return {
        "flops": flops,
        "direct_flops": direct_flops(simulator.program, sizes),
        "flops_per_second": flops / seconds,
        "peak_flops_per_second": peak,
        "matmul_rates": rates,
        "matmul_size": benchmark.matmul_size(settings.device),
        "share_of_peak": flops / seconds / peak,
    }


def _each(
    simulator: Simulator, work: Workload, settings: Settings, progress: Progress
) -> list[dict[str, Any]]:
    """One row for each optimization that is on, alone switched off, and one without any: timed in
    turn with the whole simulator.
    """
    on = simulator.optimizations
    rows = []
    for name in (*on, NOTHING):
        other = variant(simulator, [] if name == NOTHING else [kept for kept in on if kept != name])
        progress(f"without {name}: warm up")
        turns = in_turn(
            lambda: simulate(simulator, work),
            lambda other=other: simulate(other, work),  # type: ignore[misc]
            pairs=settings.pairs,
            device=settings.device,
            on_pair=lambda pair, name=name: progress(
                f"without {name}: pair {pair + 1} of {settings.pairs}"
            ),  # type: ignore[misc]
        )
        rows.append({"name": name, **turns.to_dict("full", "without")})
    return rows
