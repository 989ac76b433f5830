"""Score first, then train: dynamic evaluation of texts of any length. TINT.md section 8.

    chunk i:  losses of its targets under W^(i), final
              g = gradient of the sum of these losses;  W^(i+1), state by the inner rule

A step takes the next tokens of every row. Rows that run together are a group (`stream_rows.py`).
Legend: B rows, n new tokens, C targets of a chunk, L tokens of context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tintc.ir.builder import outputs
from tintc.ir.errors import InputError, NumericalError, UsageError
from tintc.ir.precision import wide_dtype
from tintc.runtime import carried
from tintc.runtime.adapted import Adapted
from tintc.runtime.compiled import Compiled
from tintc.runtime.decoding.program import Updates
from tintc.runtime.digest import digest_of
from tintc.runtime.slices import group_size
from tintc.runtime.stream_rows import StreamRows
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.uncached import uncached


@dataclass(frozen=True)
class StreamScores:
    """losses: (B, n), -log p of each new token under the weights before it was trained on, in at
    least float32; NaN at the first token of a document and where the mask is 0. They are final.
    """

    losses: Tensor

    @property
    def targets(self) -> int:
        """How many tokens were scored."""
        return int((~self.losses.isnan()).sum())


class StreamOverflow(NumericalError):
    """A score is not finite. chunk: the number of the step, from 0. row: of the batch. losses:
    those of the step, (B, n)."""

    def __init__(self, chunk: int, row: int, losses: Tensor) -> None:
        super().__init__(
            f"chunk {chunk} of row {row} has losses that are not finite: the weights diverged in "
            "an earlier chunk; lower inner_lr, or limit updates (clip_norm, max_drift)"
        )
        self.chunk, self.row, self.losses = chunk, row, losses


class Stream:
    """B texts side by side, each read in order. `Simulator.stream` makes it.

    learns: False for the unmodified model in the same windows.
    """

    rows: type[StreamRows] = StreamRows

    def __init__(
        self, simulator: Compiled, batch: int, settings: StreamSettings, *, learns: bool = True
    ) -> None:
        settings.check(simulator.program.facts.longest)
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise UsageError(f"batch is {batch!r}; expected a whole number, at least 1")
        if settings.keys == "cache" and simulator.structure is not None:
            raise UsageError(
                "keys=cache needs the fused back end; expected keys=recompute, or backend=fused"
            )
        if settings.keys == "cache" and uncached(simulator):
            raise UsageError(f"keys=cache: {uncached(simulator)}; expected keys=recompute")
        simulator.check_has_numbers()
        self.simulator, self.batch, self.settings, self.learns = simulator, batch, settings, learns
        self._chunks = 0
        tokens = settings.chunk + (settings.context if settings.keys == "recompute" else 0)
        together = group_size(batch, tokens, simulator.device.type)
        with torch.no_grad():
            self.groups = [
                self.rows(simulator, min(together, batch - first), settings, learns=learns)
                for first in range(0, batch, together)
            ]

    @property
    def chunks(self) -> int:
        """Steps so far."""
        return self._chunks

    @torch.no_grad()
    def step(
        self, ids: Tensor, mask: Tensor | None = None, new_document: Tensor | None = None
    ) -> StreamScores:
        """Scores the next tokens of every row, then trains on them.

        ids: (B, n), n at most C, or C + 1 for rows that begin a document, whose first token is no
        target. mask: (B, n), 0 at padding, which may stand anywhere; a row without tokens keeps
        weights and state. new_document: (B,) bool, rows whose first new token begins a document;
        a row's very first token does.
        Raises InputError for what does not fit, and then nothing has changed; StreamOverflow for
        losses that are not finite.
        """
        ids_Bn, mask_Bn, new_B = self._checked(ids, mask, new_document)
        self._check_lengths(mask_Bn, new_B)
        parts, first = [], 0
        for group in self.groups:
            rows = slice(first, first + group.count)
            parts.append(group.step(ids_Bn[rows], mask_Bn[rows], new_B[rows]))
            first = rows.stop
        losses = torch.cat(parts)
        self._chunks += 1
        self._check_finite(losses)
        return StreamScores(losses.to(self.simulator.device))

    def state_dict(self) -> dict[str, Tensor]:
        """All that the stream knows, on the host; `torch.save` and safetensors take it. Another
        stream of the same simulator and settings goes on from it with the same bits.
        """
        return carried.tensors([group.carried for group in self.groups], self._about, self.chunks)

    def adapted(self) -> Adapted:
        """What every row has learned so far, to score and generate with as with what
        `Simulator.adapt` returns: copies, which the next steps leave as they are.

        Raises UsageError for a stream of the unmodified model.
        """
        if not self.learns:
            raise UsageError("this stream reads with the unmodified model and learns nothing")
        given = [group.carried.given for group in self.groups]
        slots = outputs(self.simulator.program.graph)["updates"]
        values = {slot: torch.cat([each[slot] for each in given]) for slot in slots}
        return Adapted(self.simulator, Updates(values, frozenset()))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from there. Raises UsageError for the state of another model, config or
        settings; nothing is changed then.
        """
        groups = [group.carried for group in self.groups]
        self._chunks = carried.load(groups, state, self._about)

    @property
    def loss_dtype(self) -> torch.dtype:
        """Of the scores: at least float32."""
        return wide_dtype(self.simulator.dtype)

    @property
    def _about(self) -> dict[str, Any]:
        """What a state must agree with."""
        return {
            "weights": self._digest,
            "config": self.simulator.config.described(),
            "inner_lr": float(self.simulator.inner_lr.detach()),
            "settings": asdict(self.settings),
            "batch": self.batch,
            "learns": self.learns,
        }

    @cached_property
    def _digest(self) -> str:
        """Of the simulator's weights."""
        return digest_of(self.simulator.prefix.tensors())

    def _checked(
        self, ids: Tensor, mask: Tensor | None, new_document: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On the host, with what was left out."""
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise InputError("ids are no (batch, tokens) tensor of whole numbers")
        if ids.shape[0] != self.batch:
            raise InputError(f"ids have {ids.shape[0]} rows; this stream has {self.batch}")
        ids = ids.detach().cpu().to(torch.int64)
        mask = torch.ones_like(ids) if mask is None else mask.detach().cpu()
        if mask.shape != ids.shape:
            raise InputError(f"mask has shape {tuple(mask.shape)}; expected {tuple(ids.shape)}")
        if not ((mask == 0) | (mask == 1)).all():
            raise InputError("mask holds values other than 0 and 1")
        new = torch.zeros(self.batch) if new_document is None else new_document.detach().cpu()
        if new.shape != (self.batch,):
            raise InputError(
                f"new_document has shape {tuple(new.shape)}; expected ({self.batch},), one a row"
            )
        vocabulary = self.simulator.program.facts.vocab_size
        seen = ids[mask != 0]
        if len(seen) and not 0 <= int(seen.min()) <= int(seen.max()) < vocabulary:
            wrong = int(seen.min()) if seen.min() < 0 else int(seen.max())
            raise InputError(f"ids hold {wrong}; this model's tokens are 0 to {vocabulary - 1}")
        return ids, mask != 0, new != 0

    def _check_lengths(self, mask_Bn: Tensor, new_B: Tensor) -> None:
        most = self.settings.chunk
        history = [len(row) for group in self.groups for row in group.carried.history]
        for b, tokens in enumerate(mask_Bn.sum(-1).tolist()):
            begins = bool(new_B[b]) or not history[b]
            if tokens - begins > most:
                raise InputError(
                    f"row {b} has {tokens - begins} targets; a chunk holds {most}: pass its "
                    "tokens in several steps"
                )

    def _check_finite(self, losses: Tensor) -> None:
        """A loss that is not finite is inf here."""
        wrong = losses.isinf().any(-1).nonzero()[:, 0].tolist()
        if wrong:
            raise StreamOverflow(self.chunks - 1, wrong[0], losses)
