"""Whether the exported program of a stream's window computes what the stream computes: a few chunks
of two rows in onnxruntime, beside torch.

Legend: B rows, n new tokens, K scored columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tintc.compiler.onnx.comparison import (
    TOLERANCE,
    Check,
    Difference,
    note,
    opened,
    rate_of,
    wide_reference,
)
from tintc.compiler.onnx.streaming import NEXT, PAST_VALUE, PRESENT, SLOT, named
from tintc.ir.config import SimulatorConfig
from tintc.runtime.first_values import first_values
from tintc.runtime.key_cache import KeyCache
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_rows import no_keys
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.streaming import Stream
from tintc.runtime.windows import Fresh, Window, window

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CHUNK, CONTEXT = 8, 12  # at most: what changes with sizes shows in small ones
BATCH = 2


def compare_stream(simulator: Simulator, path: Path, settings: StreamSettings) -> Check:
    """Losses of every chunk, each under what the one before it left, and the slots behind the last
    one where they do not follow rounding. One row has a short chunk, the other none, before both go
    on. Raises NumericalError if onnx's checker refuses the model, StreamOverflow where the stream
    itself diverges.
    """
    session = opened(path)
    small = replace(
        settings, chunk=min(settings.chunk, CHUNK), context=min(settings.context, CONTEXT)
    )
    stream = wide_reference(simulator).stream(
        BATCH, chunk=small.chunk, context=small.context, keys=small.keys
    )
    rows = _Rows(session, simulator, small)
    result, limit = Check({"losses": Difference()}), TOLERANCE[simulator.dtype]
    chunk = small.chunk
    lengths = ((chunk + 1, chunk), (chunk, chunk), (max(1, chunk // 2), 0), (chunk, chunk))
    for parts in _chunks(lengths, simulator.program.facts.vocab_size):
        expected = _losses(stream, parts)
        found = rows.step(parts)
        for one, other in zip(found, expected, strict=True):
            if len(other):
                note(result.outputs["losses"], one[: len(other)], other, limit)
    if not follows_rounding(simulator.config):
        result.outputs["slots"] = Difference()
        for name, value in stream.state_dict().items():
            kind, _, slot = name.partition("/")
            if kind in ("given", "states"):
                note(result.outputs["slots"], rows.carried[f"{SLOT}{slot}"], value, limit)
    result.inputs = [
        f"random, {BATCH} rows, {len(lengths)} chunks of {small.chunk}, context {small.context}"
    ]
    return result


def follows_rounding(config: SimulatorConfig) -> bool:
    """Whether the rule makes large steps of small gradients: where these are 0 in theory (biases of
    keys), weights go where rounding points, which no loss depends on.
    """
    return config.optimizer != "sgd" or config.normalize != "none"


def _chunks(lengths: Sequence[tuple[int, int]], vocabulary: int) -> list[list[Tensor]]:
    """The new tokens of each row."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randint(vocabulary, (n,), generator=generator) for n in of_rows]
        for of_rows in lengths
    ]


def _losses(stream: Stream, parts: list[Tensor]) -> list[Tensor]:
    """torch's, of each row's targets."""
    ids_Bn = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts])
    mask_Bn = torch.arange(ids_Bn.shape[1]) < lengths.unsqueeze(-1)
    losses = stream.step(ids_Bn, mask_Bn).losses.cpu()
    return [row[~row.isnan()] for row in losses]


class _Rows:
    """A stream's rows in onnxruntime, as its user keeps them."""

    def __init__(
        self, session: InferenceSession, simulator: Simulator, settings: StreamSettings
    ) -> None:
        self.session, self.rate, self.settings = session, rate_of(simulator), settings
        self.outputs = [value.name for value in session.get_outputs()]
        self.history = [torch.zeros(0, dtype=torch.int64) for _ in range(BATCH)]
        given, states = first_values(simulator, 1)
        self.carried = {
            f"{SLOT}{slot}": torch.zeros(BATCH, *value.shape[1:], dtype=value.dtype)
            for slot, value in {**given, **states}.items()
        }
        self.cache = None
        if settings.keys == "cache":
            self.cache = KeyCache(settings.context, no_keys(simulator, BATCH))

    def step(self, parts: list[Tensor]) -> list[Tensor]:
        """Losses of each row's scored columns, (K,)."""
        begins = [not len(context) for context in self.history]
        fresh = [Fresh(part, first) for part, first in zip(parts, begins, strict=True)]
        contexts = self.history
        if self.cache is not None:
            contexts = [context[-1:] for context in contexts]
        seen = window(contexts, fresh)
        feed = {**self._feed(seen), "new_document": torch.tensor(begins), **self.carried}
        arrays: dict[str, Any] = {name: value.numpy() for name, value in feed.items()}
        values = self.session.run(None, {**arrays, "inner_lr": self.rate})
        found = dict(zip(self.outputs, map(torch.from_numpy, values), strict=True))
        self.carried = {
            name.removeprefix(NEXT): x for name, x in found.items() if name.startswith(NEXT)
        }
        if self.cache is not None:
            new = {name: found[named(PRESENT, name)] for name in self.cache.values}
            self.cache.append(list(range(BATCH)), new, [len(row.targets) for row in fresh])
        self.history = [
            torch.cat([old, row.tokens])[-self.settings.context - 1 :]
            for old, row in zip(self.history, fresh, strict=True)
        ]
        return list(found["losses"][:, seen.before :])

    def _feed(self, seen: Window) -> dict[str, Tensor]:
        feed = {
            "input_ids": seen.input_ids,
            "attention_mask": seen.valid.long(),
            "labels": seen.labels,
        }
        if self.cache is None:
            return feed
        every = list(range(BATCH))
        return {
            **feed,
            "past_mask": self.cache.seen(every).long(),
            "position_ids": self.cache.positions(every, seen.valid),
            **{named(PAST_VALUE, name): value for name, value in self.cache.rows(every).items()},
        }
