"""What `tintc bench` prints: a simulator's time and memory beside those of a hand-written autograd
loop, and whether both agree.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from tintc.compiler.artifact import save
from tintc.compiler.autograd_rule import matrices, rule_of
from tintc.compiler.cost import estimate
from tintc.compiler.driver import compile as compile_model
from tintc.compiler.gradient_statistics import chosen_statistics
from tintc.compiler.verification import ROUNDED_TOLERANCE, Rounding
from tintc.evaluate.speed import benchmark
from tintc.evaluate.speed import memory as bench_memory
from tintc.evaluate.speed.benchmark import HandWrittenLoop, Workload, in_turn, simulate, variant
from tintc.evaluate.speed.placed import Placed, Progress
from tintc.evaluate.speed.settings import Against, Options
from tintc.ir.call_sizes import call_sizes, trained_tokens
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError, UsageError
from tintc.ir.facts import ModelFacts
from tintc.passes import OPTIMIZATION_NAMES
from tintc.runtime.backends.transformer.structure import check_backend
from tintc.runtime.simulator import Simulator

AGAINST: tuple[str, ...] = get_args(Against)
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
        self.check_counts("pairs")
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
        sizes = call_sizes(
            facts, batch=self.batch, tokens=self.tokens, train_fraction=self.train_fraction
        )
        trained = trained_tokens(sizes["tokens"], self.train_fraction)
        if trained < 2:
            raise UsageError(
                f"{trained} of {sizes['tokens']} tokens is trained; expected at least 2: pass more "
                "tokens or a larger train_fraction"
            )
        return {"batch": sizes["batch"], "tokens": sizes["tokens"], "trained": trained}


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
    """Seconds, bytes and differences of one simulator and of the loop that
    `runtime.benchmark.HandWrittenLoop` describes, as JSON values.

    Both run on the same random tokens, in turn, the simulator under torch.inference_mode; `ratio`
    is the median of simulator / loop, pair by pair. flops: of one call of the simulator, as
    `tintc cost` counts them with all optimizations, or with none if all are off.

    Raises SourceError, UnsupportedModelError, UsageError, MemoryLimitError; and NumericalError
    where optimizations change the result, or where a simulator without approximation does not agree
    with the loop.
    """
    settings.check()
    statistics = chosen_statistics(source, settings.statistics, config)
    model = settings.load(source, config, settings.seed, progress)
    progress("compile")
    how: dict[str, Any] = {
        "optimize": settings.optimizations,
        "torch_compile": settings.torch_compile,
        "statistics": statistics,
    }
    simulator = compile_model(model, config, backend=settings.backend, share=settings.share, **how)
    sizes = settings.sizes(simulator.program.facts)
    names = benchmark.updated_parameters(simulator)
    memory = (
        _memory(source, simulator, settings, sizes, names, progress) if settings.memory else None
    )
    simulator, model = simulator.to(settings.device), model.to(settings.device)
    loop = HandWrittenLoop(model, names, rule_of(simulator))
    enough = {**sizes, "batch": max(sizes["batch"], _CHECKED)}
    work = benchmark.random_workload(
        simulator.program.facts.vocab_size, **enough, seed=settings.seed
    ).to(settings.device)
    progress("check")
    checks = check(simulator, loop, work.first(_CHECKED))
    work = work.first(sizes["batch"])
    progress("warm up")
    turns = in_turn(
        lambda: loop(work),
        lambda: simulate(simulator, work),
        pairs=settings.pairs,
        device=settings.device,
        on_pair=lambda pair: progress(f"pair {pair + 1} of {settings.pairs}"),
    )
    timings = turns.to_dict("loop", "simulator")
    progress("matrix products")
    return {
        "source": source,
        **_facts(simulator, settings, sizes, names),
        **timings,
        "throughput": _throughput(simulator, settings, sizes, timings["simulator_seconds"]),
        "memory": memory,
        "checks": checks,
        "each": _each(simulator, work, settings, progress) if settings.each else None,
    }


def _facts(
    simulator: Simulator, settings: Settings, sizes: dict[str, int], names: Sequence[str]
) -> dict[str, Any]:
    """Every setting, and where it ran."""
    return {
        "against": settings.against,
        "config": simulator.config.to_dict(),
        "rule": simulator.config.rule,
        "exact": simulator.config.is_exact,
        "backend": settings.backend,
        "share": settings.share,
        "optimizations": list(simulator.optimizations),
        "without": list(settings.without),
        "torch_compile": settings.torch_compile,
        "batch": sizes["batch"],
        "tokens": sizes["tokens"],
        "trained_tokens": sizes["trained"],
        "train_fraction": settings.train_fraction,
        "pairs": settings.pairs,
        "seed": settings.seed,
        **settings.where(),
        "simulator_parameters": sum(parameter.numel() for parameter in simulator.parameters()),
        "trained_parameters": list(names),
    }


def check(simulator: Simulator, loop: HandWrittenLoop, work: Workload) -> list[dict[str, Any]]:
    """Differences of logits, relative to the largest: the simulator to itself without
    optimizations, and to the loop.

    tolerance: None for an approximating config, whose difference to the loop is the approximation's
    and no error. Raises NumericalError if another exceeds its tolerance:
    `_limit`, but in float64 that of `tintc verify` where the model's own code rounds to float32.
    """
    found, plain_logits = simulate(simulator, work), simulate(variant(simulator, ()), work)
    limit = _limit(simulator, work, plain_logits)
    plain = _compared(
        "optimizations",
        "the simulator without optimizations",
        found,
        plain_logits,
        limit,
    )
    with Rounding() as rounding:
        expected = loop(work)
    if not simulator.config.is_exact:
        return [plain, _compared("approximation", "the loop", found, expected, None)]
    return [
        plain,
        _compared(
            "loop",
            "the loop",
            found,
            expected,
            max(limit, ROUNDED_TOLERANCE) if rounding.found else limit,
        ),
    ]


@torch.inference_mode()
def _limit(simulator: Simulator, work: Workload, logits: Tensor) -> float:
    """Largest difference that counts as none: `benchmark.TOLERANCE` of the largest logit, and in
    float32 a part of what training changes, which grows with the learning rate as rounding does.
    """
    limit = benchmark.TOLERANCE[simulator.dtype]
    if simulator.dtype is not torch.float32:
        return limit
    changed = benchmark.relative_difference(simulator.predict_initial(work.ids_BT), logits)
    return limit + benchmark.ROUNDED_UPDATE * changed if math.isfinite(changed) else limit


def _compared(
    name: str,
    reference: str,
    found: Tensor,
    expected: Sequence[Tensor] | Tensor,
    tolerance: float | None,
) -> dict[str, Any]:
    difference = benchmark.relative_difference(found, expected)
    if tolerance is not None and not difference <= tolerance:
        hint = (
            ""
            if found.dtype == torch.float64
            else "; dtype=float64 tells an error from rounding, which grows with inner_lr"
        )
        hint = "; pass a smaller inner_lr" if math.isnan(difference) else hint
        raise NumericalError(
            f"the simulator differs from {reference} by {difference:.1e} of the largest logit "
            f"(limit {tolerance:.0e}, "
            f"{_name(found.dtype)}){hint}"
        )
    return {
        "name": name,
        "reference": reference,
        "sequences": len(found),
        "difference": difference,
        "tolerance": tolerance,
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
        "dtype": _name(settings.dtype),
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "vocab_size": simulator.program.facts.vocab_size,
        "seed": settings.seed,
        "names": list(names),
        **sizes,
    }
    found: dict[str, Any] = {"how": bench_memory.how_measured(settings.device)}
    with tempfile.TemporaryDirectory(prefix="tintc-bench-") as folder:
        artifact = save(simulator, Path(folder) / "simulator")
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
    simulator: Simulator, settings: Settings, sizes: dict[str, int], seconds: float
) -> dict[str, Any]:
    """FLOPs of a call over its median time, beside what large square products reach here."""
    flops = estimate(
        simulator.program,
        settings.backend,
        settings.dtype,
        batch=sizes["batch"],
        tokens=sizes["tokens"],
        segment=sizes["trained"] - 1,
        optimize=bool(settings.optimizations),
    ).flops
    rates = benchmark.matmul_rates(settings.dtype, settings.device)
    peak = max(rates.values())
    return {
        "flops": flops,
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
