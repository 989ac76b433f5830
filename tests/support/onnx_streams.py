"""Texts streamed through an exported window by numpy and onnxruntime, as a user would, in other
layouts than the stream's own: windows end in the last column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

Array = np.ndarray[Any, Any]
_TYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
}  # fmt: skip


class OnnxStream:
    """Rows side by side, one text each. longest: tokens of the model's longest sequence."""

    def __init__(
        self, session: onnxruntime.InferenceSession, chunk: int, context: int, rate: float,
        longest: int | None = None,
    ) -> None:  # fmt: skip
        self.session, self.chunk, self.context, self.rate = session, chunk, context, rate
        self.longest = longest
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]
        self.cached = "past_mask" in self.inputs
        self.slots: dict[str, Array] = {}

    def read(self, texts: list[Array]) -> list[Array]:
        """The losses of each text's targets; a text that is read to its end has no more tokens."""
        rows = len(texts)
        # Any numbers at all: rows of a new document begin with the model's weights.
        self.slots = self.empty("slots.", (rows,), 0.5)
        self.past = self.empty("past.", (rows, 0))
        self.counts, self.position = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        losses: list[list[Array]] = [[] for _ in texts]
        for s in range(1, max(map(len, texts)), self.chunk):
            targets = [text[s : s + self.chunk] for text in texts]
            if self.late(targets):
                self.again([text[max(0, s - 1 - self.context) : s - 1] for text in texts])
            first = s - 1 if self.cached else max(0, s - 1 - self.context)
            windows = [text[first : s - 1 + len(y)] for text, y in zip(texts, targets, strict=True)]
            windows = [w if len(y) else w[:0] for w, y in zip(windows, targets, strict=True)]
            found = self.run(windows, targets, new=s == 1)
            self.slots = {
                name.removeprefix("next."): value
                for name, value in found.items()
                if name.startswith("next.")
            }
            for row, y in enumerate(targets):
                where = self.columns(len(windows[row]), found["losses"].shape[1])
                own = found["losses"][row, where]
                losses[row].append(own[len(own) - len(y) :])
                assert np.count_nonzero(found["losses"][row]) == len(y)
        return [np.concatenate(row) for row in losses]

    def late(self, targets: list[Array]) -> bool:
        """Whether a row would pass the model's last position; all have the same."""
        if not self.cached or self.longest is None:
            return False
        return bool((self.position + [len(y) for y in targets] > self.longest).any())

    def columns(self, count: int, tokens: int) -> slice:
        """Where a window stands: with keys in front, directly behind them."""
        return slice(0, count) if self.cached else slice(tokens - count, tokens)

    def run(self, windows: list[Array], targets: list[Array], *, new: bool) -> dict[str, Array]:
        rows, tokens = len(windows), max(1, *map(len, windows))
        ids, mask = np.full((rows, tokens), 1), np.zeros((rows, tokens), np.int64)
        labels = np.full((rows, tokens), -100)
        for row, (window, y) in enumerate(zip(windows, targets, strict=True)):
            where = self.columns(len(window), tokens)
            ids[row, where], mask[row, where] = window, 1
            labels[row, where.stop - len(y) : where.stop] = y
        feed = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "new_document": np.full(rows, new),
            "inner_lr": np.array(self.rate, _TYPES[self.inputs["inner_lr"].type]),
            **self.slots,
        }
        if not self.cached:
            return dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        width = next(iter(self.past.values())).shape[1]
        feed["past_mask"] = (np.arange(width) >= width - self.counts[:, None]).astype(np.int64)
        feed["position_ids"] = self.position[:, None] + np.arange(tokens) * mask
        found = dict(zip(self.outputs, self.session.run(None, {**feed, **self.past}), strict=True))
        self.append(found, [len(window) for window in windows])
        return found

    def append(self, found: dict[str, Array], counts: list[int]) -> None:
        """Keys of the last tokens, all of which end in the last column."""
        columns = min(self.context, int((self.counts + counts).max()))
        for name, old in self.past.items():
            new = np.zeros((len(old), columns, *old.shape[2:]), old.dtype)
            for row, n in enumerate(counts):
                had = old[row, old.shape[1] - self.counts[row] :]
                own = np.concatenate([had, found[name.replace("past", "present", 1)][row, :n]])
                own = own[max(0, len(own) - columns) :]
                new[row, columns - len(own) :] = own
            self.past[name] = new
        self.counts = np.minimum(self.counts + counts, self.context)
        self.position = self.position + counts

    def again(self, contexts: list[Array]) -> None:
        """The last tokens once more, from position 0: without labels, nothing is trained."""
        self.past = self.empty("past.", (len(contexts), 0))
        self.counts, self.position = self.counts * 0, self.position * 0
        if len(contexts[0]):
            self.run(contexts, [context[:0] for context in contexts], new=False)

    def empty(self, start: str, sizes: tuple[int, ...], number: float = 0.0) -> dict[str, Array]:
        return {
            name: np.full((*sizes, *value.shape[len(sizes) :]), number, _TYPES[value.type])
            for name, value in self.inputs.items()
            if name.startswith(start)
        }
