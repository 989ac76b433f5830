"""What `tintc bench --generate` prints: an adapted simulator's tokens a second beside those of
Hugging Face's `generate`.

    alone:  one sequence, beside the unmodified Hugging Face model: what one would use instead
    beside: B sequences, beside a loop over them, each with its own updated weights in the model;
            and a loop over our own program for one

Everything runs in turn on the same random texts, greedily. Loading weights into the model is not
timed, nor is adapting, which is told apart. Legend: B sequences, T tokens of context.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tintc.compiler.driver import compile as compile_model
from tintc.compiler.gradient_statistics import chosen_statistics
from tintc.evaluate.speed.bandwidth import bytes_read
from tintc.evaluate.speed.benchmark import TOLERANCE, relative_difference
from tintc.evaluate.speed.placed import Placed, Progress
from tintc.evaluate.speed.settings import GenerateOptions
from tintc.evaluate.speed.workload import Workload, random_workload
from tintc.ir.call_sizes import trained_tokens
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError, UsageError
from tintc.runtime.adapted import Adapted
from tintc.runtime.machine import copy_bandwidth, timed
from tintc.runtime.simulator import Simulator

Seconds = dict[str, list[float]]  # side -> of each round


@dataclass(frozen=True)
class Settings(GenerateOptions, Placed):
    """What is measured, and where; as `report.Settings`."""

    def check(self, longest: int | None) -> None:
        """Raises UsageError for what cannot be measured."""
        self.check_counts("pairs", "batch", "new_tokens")
        if longest is not None and self.tokens + self.new_tokens > longest:
            raise UsageError(
                f"{self.tokens} tokens and {self.new_tokens} generated ones are more than the "
                f"{longest} of this model; expected fewer"
            )


def stages(settings: Settings) -> int:
    """Calls of `progress`."""
    return 5 + 2 * settings.pairs


def generate_report(
    source: str,
    config: SimulatorConfig,
    settings: Settings,
    *,
    progress: Progress = lambda stage: None,
) -> dict[str, Any]:
    """Tokens a second of both sides at batch 1 and at batch B, seconds of adapting, and the share
    of the memory's bandwidth that reading the weights takes at batch 1, as JSON values.

    times: ours over theirs, the median of the rounds' own. Raises SourceError,
    UnsupportedModelError, UsageError; NumericalError where logits behind the context differ from
    those of the Hugging Face model with the same weights.
    """
    statistics_of = chosen_statistics(source, settings.statistics, config)
    model = settings.load(source, config, settings.seed, progress)
    progress("compile")
    simulator = compile_model(copy.deepcopy(model), config, statistics=statistics_of)
    settings.check(simulator.program.facts.longest)
    simulator, model = simulator.to(settings.device), model.to(settings.device).eval()
    work = _workload(simulator, settings)
    progress("adapt")
    one, adapt_one = _adapted(simulator, work.few(1), settings)
    every, adapt_every = _adapted(simulator, work, settings)
    progress("check")
    checked = _check(model, every, work, settings)
    sides = _Sides(model, every, one, work, settings)
    alone = _rounds(sides.alone(), settings, progress, "batch 1")
    beside = _rounds(sides.beside(), settings, progress, f"batch {settings.batch}")
    progress("bandwidth")
    return {
        "source": source,
        **_facts(simulator, settings),
        "alone": {
            "form": one.form,
            "adapt_seconds": adapt_one,
            **_compared(alone, settings.new_tokens),
        },
        "beside": {
            "form": every.form,
            "adapt_seconds": adapt_every,
            **_compared(beside, settings.batch * settings.new_tokens),
        },
        "bandwidth": _bandwidth(one, alone, settings),
        "check": checked,
    }


class _Sides:
    """What is timed. Each is a list of functions: what is done beforehand, and what is timed."""

    def __init__(
        self, model: Any, every: Adapted, one: Adapted, work: Workload, settings: Settings
    ) -> None:
        self.model, self.every, self.one, self.work = model, every, one, work
        self.count = settings.new_tokens
        self.original = {name: value.clone() for name, value in model.state_dict().items()}

    def alone(self) -> dict[str, Side]:
        """One sequence; theirs is the unmodified model."""
        ids = self.work.ids_BT[:1]
        return {
            "ours": [(_nothing, lambda: self._generate(self.one, ids))],
            "unmodified": [(self._load_original, lambda: self._generate(self.model, ids))],
        }

    def beside(self) -> dict[str, Side]:
        """All sequences, each with its weights."""
        rows = list(range(len(self.every)))
        return {
            "ours": [(_nothing, lambda: self._generate(self.every, self.work.ids_BT))],
            "loop": [
                (lambda row=row: self._load(row), lambda row=row: self._of_row(self.model, row))  # type: ignore[misc]
                for row in rows
            ],
            "own_loop": [(_nothing, lambda row=row: self._of_row(self.one, row)) for row in rows],  # type: ignore[misc]
        }

    def _of_row(self, model: Any, row: int) -> Tensor:
        return self._generate(model, self.work.ids_BT[row : row + 1])

    def _generate(self, model: Any, ids: Tensor) -> Tensor:
        return greedy(model, ids, self.count)

    def _load(self, row: int) -> None:
        self.model.load_state_dict(self.every.state_dict(row), strict=False)

    def _load_original(self) -> None:
        self.model.load_state_dict(self.original)


Side = list[tuple[Callable[[], object], Callable[[], object]]]


def _nothing() -> None:
    """Nothing has to be done beforehand."""


def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    """Exactly so many tokens more, whatever ends a text."""
    found: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return found


def _rounds(sides: dict[str, Side], settings: Settings, progress: Progress, label: str) -> Seconds:
    """Each side once without being counted, then all in turn."""
    found: Seconds = {name: [] for name in sides}
    for side in sides.values():
        _total(side[:1], settings)
    for number in range(settings.pairs):
        progress(f"{label}: round {number + 1} of {settings.pairs}")
        for name, side in sides.items():
            found[name].append(_total(side, settings))
    return found


def _total(side: Side, settings: Settings) -> float:
    seconds = 0.0
    for before, function in side:
        before()
        seconds += timed(function, settings.device)
    return seconds


def _compared(seconds: Seconds, tokens: int) -> dict[str, Any]:
    """Tokens a second, and how many times the others' ours are."""
    found: dict[str, Any] = {
        "tokens_per_second": {
            name: tokens / statistics.median(times) for name, times in seconds.items()
        },
        "seconds": seconds,
    }
    for name, times in seconds.items():
        if name != "ours":
            ratios = [b / a for a, b in zip(seconds["ours"], times, strict=True)]
            found[f"times_{name}"] = statistics.median(ratios)
            found[f"range_{name}"] = [min(ratios), max(ratios)]
    return found


def _bandwidth(one: Adapted, alone: Seconds, settings: Settings) -> dict[str, float]:
    """Bytes of weights that a token reads at batch 1, over the seconds it takes and over what a
    copy of memory moves.
    """
    read, copied = bytes_read(one), copy_bandwidth(settings.device)
    per_second = read * settings.new_tokens / statistics.median(alone["ours"])
    return {
        "bytes_read_per_token": read,
        "bytes_per_second": per_second,
        "copy_bytes_per_second": copied,
        "share": per_second / copied,
    }


def _workload(simulator: Simulator, settings: Settings) -> Workload:
    return random_workload(
        simulator.program.facts.vocab_size,
        batch=settings.batch,
        tokens=settings.tokens,
        trained=trained_tokens(settings.tokens, settings.train_fraction),
        seed=settings.seed,
    ).to(settings.device)


def _adapted(simulator: Simulator, work: Workload, settings: Settings) -> tuple[Adapted, float]:
    """What was learned, and the seconds of a call that is not the first of its kind."""

    def adapt() -> Adapted:
        return simulator.adapt(work.ids_BT, work.train_mask)

    adapted = adapt()
    return adapted, timed(adapt, settings.device)


def _check(model: Any, every: Adapted, work: Workload, settings: Settings) -> dict[str, Any]:
    """Logits behind the context, of the first and the last sequence."""
    rows = sorted({0, len(every) - 1})
    found = every(work.ids_BT, logits_to_keep=1).logits[rows]
    expected = []
    for row in rows:
        model.load_state_dict(every.state_dict(row), strict=False)
        with torch.no_grad():
            expected.append(model(work.ids_BT[row : row + 1]).logits[0, -1:])
    difference = relative_difference(list(found), expected)
    limit = 10 * TOLERANCE[settings.dtype]
    if not difference <= limit:
        raise NumericalError(
            f"logits under the updated weights differ from the Hugging Face model's by "
            f"{difference:.1e} of the largest (limit {limit:.0e}); dtype=float64 tells an error "
            "from rounding"
        )
    return {"difference": difference, "tolerance": limit, "sequences": len(rows)}


def _facts(simulator: Simulator, settings: Settings) -> dict[str, Any]:
    return {
        "config": simulator.config.to_dict(),
        "rule": simulator.config.rule,
        **{name: getattr(settings, name) for name in ("tokens", "new_tokens", "train_fraction")},
        **{name: getattr(settings, name) for name in ("batch", "pairs", "seed")},
        **settings.where(),
    }
