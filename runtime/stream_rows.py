"""Some rows of a stream that run together: one window of theirs at a time. TINT.md section 8.

    losses of the window's targets under W, final;  W, state <- inner rule (W, state, gradient)

Legend: B rows, n new tokens, L tokens of context, K scored columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tintc.ir.node_meta import info
from tintc.ir.outputs import SLOTS, Output
from tintc.ir.precision import wide_dtype
from tintc.passes.stream.cached_keys import cached_dtype, cached_values
from tintc.runtime.batch import Batch
from tintc.runtime.call import Call
from tintc.runtime.carried import Carried, Slots
from tintc.runtime.compiled import Compiled
from tintc.runtime.first_values import first_values
from tintc.runtime.key_cache import KeyCache
from tintc.runtime.masks import complete
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.windows import IGNORED, Fresh, Window, window


class StreamRows:
    """Rows that are side by side in every tensor, each with weights, state and context of its own.

    learns: False for the unmodified model in the same windows.
    """

    def __init__(
        self, simulator: Compiled, rows: int, settings: StreamSettings, *, learns: bool
    ) -> None:
        self.simulator, self.count, self.settings, self.learns = simulator, rows, settings, learns
        self.carried = Carried([_nothing() for _ in range(rows)])
        if learns:
            self.carried.given, self.carried.states = first_values(simulator, rows)
        if settings.keys == "cache":
            self.carried.cache = KeyCache(settings.context, no_keys(simulator, rows))

    @property
    def cache(self) -> KeyCache | None:
        """Of keys and values, with keys=cache."""
        return self.carried.cache

    def step(self, ids_Bn: Tensor, mask_Bn: Tensor, new_B: Tensor) -> Tensor:
        """(B, n) losses on the host, NaN where nothing is scored and inf where a loss is not
        finite. Arguments as of `Stream.step`, checked and on the host.
        """
        self._begin(new_B & mask_Bn.any(-1))
        fresh = [
            Fresh(ids_Bn[b, mask_Bn[b]], begins=not len(self.carried.history[b]))
            for b in range(self.count)
        ]
        dtype = wide_dtype(self.simulator.dtype)
        losses = torch.full(ids_Bn.shape, float("nan"), dtype=dtype)
        active = [b for b, row in enumerate(fresh) if len(row.targets)]
        if active:
            found = self._run(active, [fresh[b] for b in active])
            for b, of_row in zip(active, found, strict=True):
                columns = mask_Bn[b].nonzero()[:, 0][1 if fresh[b].begins else 0 :]
                losses[b, columns] = of_row[: len(columns)].nan_to_num(float("inf"), float("inf"))
        for b, row in enumerate(fresh):
            read = torch.cat([self.carried.history[b], row.tokens])
            self.carried.history[b] = read[-self.settings.context - 1 :]
        return losses

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
            first, zero = first_values(self.simulator, len(rows))
            self._keep(rows, first, self.carried.given)
            self._keep(rows, zero, self.carried.states)

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
            by_length = bool(self.simulator.program.facts.by_length)
            found = complete(batch, columns_T, self.simulator.dtype, by_length=by_length)
            return found.tensors
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
        if len(rows) == self.count:
            return values
        return {slot: value[rows] for slot, value in values.items()}

    def _keep(self, rows: list[int], new: Tensor | Slots, into: Slots) -> None:
        """Not in place: who reads under torch.inference_mode() now may not do so later."""
        assert isinstance(new, dict)
        if len(rows) == self.count:
            into.update(new)
            return
        at = torch.tensor(rows, device=self.simulator.device)
        for slot, value in new.items():
            into[slot] = into[slot].index_copy(0, at, value)


def no_keys(simulator: Compiled, batch: int) -> Slots:
    """Name -> (B, 0, ...): keys and values of no tokens."""
    found = {}
    for name, node in cached_values(simulator.program.graph).items():
        sizes = [size for size in info(node).shape[2:] if isinstance(size, int)]
        dtype = cached_dtype(name, simulator.dtype)
        found[name] = torch.zeros(batch, 0, *sizes, dtype=dtype, device=simulator.device)
    return found


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)
