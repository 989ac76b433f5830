"""Score first, then train: dynamic evaluation of texts of any length. TINT.md section 8.

    chunk i:  losses of its targets under W^(i), final
              g = gradient of the sum of these losses;  W^(i+1), state by the inner rule

A step takes the next tokens of every row, each row with weights, state and context of its own.
Legend: B rows, n new tokens, C targets of a chunk, L tokens of context, K scored columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tintc.ir.errors import InputError, NumericalError, UsageError
from tintc.ir.node_meta import info
from tintc.ir.outputs import SLOTS, Output
from tintc.passes.stream.cached_keys import cached_values
from tintc.runtime.batch import Batch
from tintc.runtime.carried import Carried, Slots
from tintc.runtime.compiled import Call, Compiled
from tintc.runtime.digest import digest_of
from tintc.runtime.key_cache import KeyCache
from tintc.runtime.masks import complete
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.windows import IGNORED, Fresh, Window, window


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
        simulator.check_has_numbers()
        self.simulator, self.batch, self.settings, self.learns = simulator, batch, settings, learns
        self.carried = Carried([_nothing() for _ in range(batch)])
        if learns:
            with torch.no_grad():
                self.carried.given, self.carried.states = simulator.first_values(batch)
        if settings.keys == "cache":
            widths = {
                name: tuple(size for size in info(node).shape[2:] if isinstance(size, int))
                for name, node in cached_values(simulator.program.graph).items()
            }
            like = torch.empty(0, dtype=simulator.dtype, device=simulator.device)
            self.carried.cache = KeyCache(batch, settings.context, widths, like)

    @property
    def chunks(self) -> int:
        """Steps so far."""
        return self.carried.chunks

    @property
    def cache(self) -> KeyCache | None:
        """Of keys and values, with keys=cache."""
        return self.carried.cache

    @torch.no_grad()
    def step(
        self, ids: Tensor, mask: Tensor | None = None, new_document: Tensor | None = None
    ) -> StreamScores:
        """Scores the next tokens of every row, then trains on them.

        ids: (B, n), n at most C, or C + 1 for rows that begin a document, whose first token is no
        target. mask: (B, n), 0 at padding, which may stand anywhere; a row without tokens keeps
        weights and state. new_document: (B,) bool, rows whose first new token begins a document;
        a row's very first token does.
        Raises InputError for what does not fit, StreamOverflow for losses that are not finite.
        """
        ids_Bn, mask_Bn, new_B = self._checked(ids, mask, new_document)
        fresh = self._fresh(ids_Bn, mask_Bn, new_B)
        self._check_lengths(fresh)
        self._begin(new_B & mask_Bn.any(-1))
        losses = torch.full(ids_Bn.shape, float("nan"), dtype=self.loss_dtype)
        active = [b for b, row in enumerate(fresh) if len(row.targets)]
        if active:
            found = self._run(active, [fresh[b] for b in active])
            for b, of_row in zip(active, found, strict=True):
                columns = mask_Bn[b].nonzero()[:, 0][1 if fresh[b].begins else 0 :]
                losses[b, columns] = of_row[: len(columns)]
        for b, row in enumerate(fresh):
            self.carried.history[b] = torch.cat([self.carried.history[b], row.tokens])[
                -self.settings.context - 1 :
            ]
        self.carried.chunks += 1
        self._check_finite(losses, [len(row.targets) for row in fresh])
        return StreamScores(losses.to(self.simulator.device))

    def state_dict(self) -> dict[str, Tensor]:
        """All that the stream knows, on the host; `torch.save` and safetensors take it. Another
        stream of the same simulator and settings goes on from it with the same bits.
        """
        return self.carried.tensors(self._about)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from there. Raises UsageError for the state of another model, config or
        settings.
        """
        self.carried.load(state, self._about)

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

    @property
    def loss_dtype(self) -> torch.dtype:
        """Of the scores: at least float32."""
        return torch.promote_types(self.simulator.dtype, torch.float32)

    # What comes in

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

    def _fresh(self, ids_Bn: Tensor, mask_Bn: Tensor, new_B: Tensor) -> list[Fresh]:
        return [
            Fresh(ids_Bn[b, mask_Bn[b]], bool(new_B[b]) or not len(self.carried.history[b]))
            for b in range(self.batch)
        ]

    def _check_lengths(self, fresh: list[Fresh]) -> None:
        most = self.settings.chunk
        for b, row in enumerate(fresh):
            if len(row.targets) > most:
                raise InputError(
                    f"row {b} has {len(row.targets)} targets; a chunk holds {most}: pass its "
                    "tokens in several steps"
                )

    def _begin(self, new_B: Tensor) -> None:
        """Rows whose document ends here: their context is left behind, and with reset=document
        what they have learned.
        """
        rows = new_B.nonzero()[:, 0].tolist()
        for b in rows:
            self.carried.history[b] = _nothing()
        if self.cache is not None:
            self.cache.clear(rows)
        if rows and self.learns and self.settings.reset == "document":
            first, zero = self.simulator.first_values(1)
            for values, start in ((self.carried.given, first), (self.carried.states, zero)):
                for slot, value in values.items():
                    value[rows] = start[slot]

    # One window

    def _run(self, active: list[int], fresh: list[Fresh]) -> Tensor:
        """(rows, K) losses of the active rows, whose weights, state and keys move on."""
        contexts = [self.carried.history[b] for b in active]
        if self.cache is not None:
            self._refill(active, fresh)
            contexts = [context[-1:] for context in contexts]
        found = self._of_window(active, window(contexts, fresh), self.learns)
        if self.learns:
            self._keep(active, found[Output.UPDATES], self.carried.given)
            self._keep(active, found[Output.STATES], self.carried.states)
        if self.cache is not None:
            new = found[Output.CACHE]
            assert isinstance(new, dict)
            self.cache.append(active, new, [len(row.targets) for row in fresh])
        losses = found[Output.INITIAL_LOSSES]
        assert isinstance(losses, Tensor)
        return losses.cpu()

    def _of_window(
        self, active: list[int], seen: Window, trains: bool
    ) -> dict[str, Tensor | Slots]:
        """Losses of a window under the weights of now, new keys, and what training leaves."""
        device, simulator = self.simulator.device, self.simulator
        ids_BT, labels_BT, scored_K = (
            x.to(device) for x in (seen.input_ids, seen.labels, seen.scored)
        )
        tensors = self._tensors(active, seen, ids_BT)
        has_target_BT = labels_BT != IGNORED
        call = Call(
            (Output.INITIAL_LOSSES,),
            {
                **tensors,
                "targets": labels_BT.clamp(min=0),
                "loss_mask": has_target_BT.to(simulator.dtype),
                "labels": labels_BT,
            },
            segment=ids_BT.shape[1],
            causal=self.cache is None and bool(seen.valid.all()),
            kept=scored_K,
            window=True,
            cache=None if self.cache is None else self.cache.rows(active),
        )
        if self.learns:
            call = replace(
                call,
                outputs=(*call.outputs, *SLOTS) if trains else call.outputs,
                given=self._rows(active, self.carried.given),
                states=self._rows(active, self.carried.states),
            )
        if self.cache is not None:
            call = replace(call, outputs=(*call.outputs, Output.CACHE))
        return simulator.run_window(call)

    def _tensors(self, active: list[int], seen: Window, ids_BT: Tensor) -> dict[str, Tensor]:
        """Masks and positions of a window."""
        device, columns_T = ids_BT.device, torch.arange(ids_BT.shape[1], device=ids_BT.device)
        if self.cache is None:
            valid = None if bool(seen.valid.all()) else seen.valid.to(device)
            batch = Batch(ids_BT, torch.zeros_like(ids_BT), attention_mask=valid)
            return complete(batch, columns_T, self.simulator.dtype).tensors
        return {
            "input_ids": ids_BT,
            "position_ids": self.cache.positions(active, seen.valid).to(device),
            "attention_mask": self.cache.mask(active, seen.valid).to(device),
        }

    def _refill(self, active: list[int], fresh: list[Fresh]) -> None:
        """Where a chunk would pass the model's longest sequence, the last L tokens are run once
        under the newest weights, from position 0.
        """
        longest = self.simulator.program.facts.longest
        assert self.cache is not None
        if longest is None:
            return
        late = [
            b
            for b, row in zip(active, fresh, strict=True)
            if self.cache.next_position[b] + len(row.targets) > longest
        ]
        if not late:
            return
        self.cache.clear(late)
        again = [b for b in late if len(self.carried.history[b]) > 1]
        if again:
            tokens = [Fresh(self.carried.history[b], begins=True) for b in again]
            seen = window([_nothing() for _ in again], tokens)
            self._fill(again, seen, [len(row.targets) for row in tokens])

    def _fill(self, rows: list[int], seen: Window, lengths: list[int]) -> None:
        """Keys and values of tokens that are neither scored nor trained on."""
        assert self.cache is not None
        ids_BT = seen.input_ids.to(self.simulator.device)
        tensors = self._tensors(rows, seen, ids_BT)
        unused = {
            "targets": ids_BT,
            "loss_mask": torch.zeros_like(ids_BT, dtype=self.simulator.dtype),
        }
        call = Call(
            (Output.CACHE,),
            {**tensors, **unused},
            segment=ids_BT.shape[1],
            window=True,
            cache=self.cache.rows(rows),
            given=self._rows(rows, self.carried.given) if self.learns else None,
            states=self._rows(rows, self.carried.states) if self.learns else None,
        )
        new = self.simulator.run_window(call)[Output.CACHE]
        assert isinstance(new, dict)
        self.cache.append(rows, new, lengths)

    # Rows of the slots

    def _rows(self, rows: list[int], values: Slots) -> Slots:
        if len(rows) == self.batch:
            return values
        return {slot: value[rows] for slot, value in values.items()}

    def _keep(self, rows: list[int], new: Tensor | Slots, into: Slots) -> None:
        assert isinstance(new, dict)
        if len(rows) == self.batch:
            into.update(new)
            return
        for slot, value in new.items():
            into[slot][rows] = value

    def _check_finite(self, losses: Tensor, targets: list[int]) -> None:
        for b, count in enumerate(targets):
            if int(losses[b].isfinite().sum()) != count:
                raise StreamOverflow(self.chunks - 1, b, losses)


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)
