"""What `tintc bench --stream` prints: a stream beside the loops that one would write by hand.

Everything runs chunk by chunk in turn on the same random texts, behind L tokens of context.
Legend: B sequences, C targets of a chunk, L tokens of context.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tintc.compiler.autograd_rule import rule_of
from tintc.compiler.cost import WRITTEN_OVER
from tintc.compiler.driver import compile as compile_model
from tintc.compiler.gradient_statistics import chosen_statistics
from tintc.evaluate.speed import memory
from tintc.evaluate.speed.benchmark import (
    TOLERANCE,
    in_turn,
    relative_difference,
    updated_parameters,
)
from tintc.evaluate.speed.placed import Placed, Progress
from tintc.evaluate.speed.settings import StreamOptions
from tintc.evaluate.speed.stream_loop import StreamLoop
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.streaming import Stream

CONTEXTS = (5, 50)  # texts of so many contexts, whose peak memory is compared
_CHECKED = 3  # chunks
_UNCOUNTED = ("onednn_products", "chunk_head", "flash_attention")  # torch counts none of theirs


@dataclass(frozen=True)
class Settings(StreamOptions, Placed):
    """What is measured, and where; as `report.Settings`."""

    @property
    def cut(self) -> StreamSettings:
        """How texts are cut."""
        return StreamSettings(self.chunk, self.context, self.keys)


def stages(settings: Settings) -> int:
    """Calls of `progress`."""
    loops = 2 if settings.keys == "cache" else 1
    return 4 + loops * settings.pairs + (len(CONTEXTS) if settings.memory else 0)


def stream_report(
    source: str,
    config: SimulatorConfig,
    settings: Settings,
    *,
    progress: Progress = lambda stage: None,
) -> dict[str, Any]:
    """Seconds of a chunk of B texts, tokens a second, operations and peak memory, as JSON values.

    The loop recomputes its context; with keys=cache there is a second one that keeps its keys.
    ratio: the median of stream / loop, pair by pair. counted: the same of operations that torch's
    FlopCounterMode counts.

    Raises SourceError, UnsupportedModelError, UsageError; and NumericalError where a stream without
    approximation does not agree with the loop of its kind.
    """
    settings.check_counts("pairs", "batch")
    statistics = chosen_statistics(source, settings.statistics, config)
    model = settings.load(source, config, settings.seed, progress)
    progress("compile")
    simulator = compile_model(copy.deepcopy(model), config, statistics=statistics)
    simulator, model = simulator.to(settings.device), model.to(settings.device)
    kinds = ("recompute",) if settings.keys == "recompute" else ("recompute", "cache")
    progress("check")
    checked = _check(simulator, model, settings)
    progress("count operations")
    counted = _counted(simulator, model, settings, kinds)
    rows = {}
    for kind in kinds:
        loop = _Side.of_loop(model, simulator, settings, kind)
        stream = _Side.of_stream(simulator, settings)
        turns = in_turn(
            loop,
            stream,
            pairs=settings.pairs,
            device=settings.device,
            on_pair=lambda pair, kind=kind: progress(  # type: ignore[misc]
                f"{kind}: pair {pair + 1} of {settings.pairs}"
            ),
        )
        tokens = settings.batch * settings.chunk
        found = turns.to_dict("loop", "stream")
        rows[kind] = {
            **found,
            "stream_tokens_per_second": tokens / found["stream_seconds"],
            "loop_tokens_per_second": tokens / found["loop_seconds"],
            "counted": counted["stream"] / counted[kind],
        }
    return {
        "source": source,
        **_facts(simulator, settings),
        "flops": counted,
        "against": rows,
        "check": checked,
        "memory": _memory(simulator, settings, progress) if settings.memory else None,
    }


def _facts(simulator: Simulator, settings: Settings) -> dict[str, Any]:
    return {
        "config": simulator.config.to_dict(),
        "rule": simulator.config.rule,
        "exact": simulator.config.is_exact,
        **{name: getattr(settings, name) for name in ("chunk", "context", "keys", "batch")},
        **{name: getattr(settings, name) for name in ("pairs", "seed")},
        **settings.where(),
    }


class _Side:
    """One more chunk at each call, behind a whole context."""

    def __init__(self, step: Callable[[int], object], settings: Settings, *, begin: bool) -> None:
        self._step, self._chunk, self._next = step, settings.chunk, 1
        while begin and self._next <= settings.context:
            self()

    def __call__(self) -> object:
        start, self._next = self._next, self._next + self._chunk
        return self._step(start)

    @classmethod
    def of_stream(cls, simulator: Simulator, settings: Settings) -> _Side:
        stream, ids = Stream(simulator, settings.batch, settings.cut), _texts(simulator, settings)

        def step(s: int) -> Tensor:
            return stream.step(ids[:, 0 if s == 1 else s : s + settings.chunk]).losses

        return cls(step, settings, begin=True)

    @classmethod
    def of_loop(
        cls, model: Any, simulator: Simulator, settings: Settings, kind: Any, *, begin: bool = False
    ) -> _Side:
        """Where it recomputes, only timing asks for the chunks before."""
        cut, ids = replace(settings.cut, keys=kind), _texts(simulator, settings)
        loop = StreamLoop(
            model, updated_parameters(simulator), rule_of(simulator), cut, settings.batch
        )
        side = cls(lambda s: loop.step(ids, s), settings, begin=begin or kind == "cache")
        if not begin and kind == "recompute":
            side._next = 1 + -(-settings.context // settings.chunk) * settings.chunk
        return side


def _texts(simulator: Simulator, settings: Settings) -> Tensor:
    """(B, N) random ids, enough for all that is timed."""
    chunks = -(-settings.context // settings.chunk) + settings.pairs + _CHECKED + 2
    generator = torch.Generator().manual_seed(settings.seed)
    sizes = (settings.batch, 1 + chunks * settings.chunk)
    ids = torch.randint(simulator.program.facts.vocab_size, sizes, generator=generator)
    return ids.to(settings.device)


def _check(simulator: Simulator, model: Any, settings: Settings) -> dict[str, Any]:
    """Losses of the first chunks of one text, of the stream and of the loop of its kind."""
    one = replace(settings, batch=1)
    ids, chunk = _texts(simulator, one), settings.chunk
    stream = Stream(simulator, 1, settings.cut)
    loop = StreamLoop(
        copy.deepcopy(model), updated_parameters(simulator), rule_of(simulator), settings.cut, 1
    )
    found, expected = [], []
    for number in range(_CHECKED):
        s = 1 + number * chunk
        losses = stream.step(ids[:, 0 if number == 0 else s : s + chunk]).losses[0]
        found.append(losses[1:] if number == 0 else losses)
        expected.append(loop.step(ids, s)[0])
    difference = relative_difference([torch.cat(found)], [torch.cat(expected)])
    limit = 100 * TOLERANCE[settings.dtype] if simulator.config.is_exact else None
    if limit is not None and not difference <= limit:
        raise NumericalError(
            f"the stream differs from the loop by {difference:.1e} of the largest loss (limit "
            f"{limit:.0e}); dtype=float64 tells an error from rounding, which grows with inner_lr"
        )
    return {"difference": difference, "tolerance": limit, "chunks": _CHECKED}


def _counted(
    simulator: Simulator, model: Any, settings: Settings, kinds: tuple[str, ...]
) -> dict[str, int]:
    """Operations of one chunk of one text behind a whole context, as torch counts them: of kernels
    that it does not know, fused attention among them, by those that they replace.
    """
    one = replace(settings, batch=1)
    plain = copy.copy(simulator)
    plain.optimizations = tuple(name for name in simulator.optimizations if name not in _UNCOUNTED)
    sides = {"stream": _Side.of_stream(plain, one)}
    for kind in kinds:
        sides[kind] = _Side.of_loop(copy.deepcopy(model), simulator, one, kind)
    found = {}
    for name, side in sides.items():
        counter = FlopCounterMode(display=False, custom_mapping=WRITTEN_OVER)
        with sdpa_kernel(SDPBackend.MATH), counter:
            side()
        found[name] = counter.get_total_flops()
    return found


def _memory(simulator: Simulator, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Peak bytes of this process while one text of so many contexts is read. More than one text
    needs weights for each.
    """
    device, one = settings.device, replace(settings, batch=1)
    stream = Stream(simulator, 1, settings.cut)
    generator = torch.Generator().manual_seed(one.seed)
    found: dict[str, Any] = {}
    read = 0
    for contexts in CONTEXTS:
        progress(f"memory over {contexts} contexts")
        gc.collect()
        memory.reset_peak(device)
        while read < contexts * max(settings.context, settings.chunk):
            count = settings.chunk + (read == 0)
            ids = torch.randint(simulator.program.facts.vocab_size, (1, count), generator=generator)
            stream.step(ids)
            read += count
        found[str(contexts)] = memory.peak(device)
    return {"peak_bytes": found, "ratio": found[str(CONTEXTS[1])] / found[str(CONTEXTS[0])]}
