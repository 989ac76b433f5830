"""Documents in the rows of a stream: which tokens each step reads.

    row b:  document b, then b + B, b + 2 B, ... ; each from its first token to its last

What a step reads follows from the documents and the number of steps before it, so that a stream
that was stopped goes on by `skip`. Legend: B rows, n tokens of a step, C targets of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tintc.ir.errors import InputError
from tintc.runtime.streaming import Stream, StreamScores

Progress = Callable[[int, StreamScores], None]  # number of the chunk, and its scores


@dataclass(frozen=True)
class Piece:
    """What one step scored of one document. start: where in the document its first target stands.
    losses: (n,), on the host. unmodified: those of the unmodified model. is_last: of the document.
    """

    document: int
    start: int
    losses: Tensor
    unmodified: Tensor | None
    is_last: bool


class Rows:
    """Reads documents step by step. beside: a stream of the unmodified model, which reads the same
    windows. Raises InputError for a document without a target.
    """

    def __init__(
        self, stream: Stream, documents: list[Tensor], beside: Stream | None = None
    ) -> None:
        for number, tokens in enumerate(documents):
            if tokens.ndim != 1 or len(tokens) < 2:
                raise InputError(
                    f"document {number} has shape {tuple(tokens.shape)}; expected at least two "
                    "tokens, of which the second is the first target"
                )
        self.stream, self.beside = stream, beside
        self._documents = [tokens.cpu() for tokens in documents]
        self._queues = [
            list(range(row, len(documents), stream.batch)) for row in range(stream.batch)
        ]
        self._read = [0] * len(documents)  # tokens

    @property
    def is_done(self) -> bool:
        return not any(self._queues)

    @property
    def reading(self) -> list[int | None]:
        """Document of each row."""
        return [queue[0] if queue else None for queue in self._queues]

    def skip(self, steps: int) -> None:
        """Goes on behind so many steps, which the streams have behind them. Raises InputError if
        the documents do not have so many.
        """
        for number in range(steps):
            if self.is_done:
                raise InputError(f"the documents are read after {number} steps, before {steps}")
            self._advance(self._taken())

    def step(self, progress: Progress | None = None) -> list[Piece]:
        """Of each row that reads, what was scored, in the order of the rows. Raises StreamOverflow
        for losses that are not finite.
        """
        documents, parts_Bn = self.reading, self._taken()
        begins_B = torch.tensor(
            [document is not None and not self._read[document] for document in documents]
        )
        ids_Bn = torch.nn.utils.rnn.pad_sequence(parts_Bn, batch_first=True)
        lengths_B1 = torch.tensor([len(part) for part in parts_Bn]).unsqueeze(-1)
        mask_Bn = torch.arange(ids_Bn.shape[1]) < lengths_B1
        scores = self.stream.step(ids_Bn, mask_Bn, begins_B)
        plain = None if self.beside is None else self.beside.step(ids_Bn, mask_Bn, begins_B)
        if progress is not None:
            progress(self.stream.chunks - 1, scores)
        pieces = []
        for row, document in enumerate(documents):
            if document is None:
                continue
            first, stop = int(begins_B[row]), len(parts_Bn[row])
            read = self._read[document]
            pieces.append(
                Piece(
                    document,
                    read + first,
                    scores.losses[row, first:stop].cpu(),
                    None if plain is None else plain.losses[row, first:stop].cpu(),
                    read + stop == len(self._documents[document]),
                )
            )
        self._advance(parts_Bn)
        return pieces

    def _taken(self) -> list[Tensor]:
        """The next tokens of each row: those of one chunk of targets."""
        parts = []
        for document in self.reading:
            if document is None:
                parts.append(torch.zeros(0, dtype=torch.int64))
                continue
            read, chunk = self._read[document], self.stream.settings.chunk
            count = chunk if read else chunk + 1  # the first token is no target
            parts.append(self._documents[document][read : read + count])
        return parts

    def _advance(self, parts: list[Tensor]) -> None:
        for row, document in enumerate(self.reading):
            if document is None:
                continue
            self._read[document] += len(parts[row])
            if self._read[document] == len(self._documents[document]):
                self._queues[row].pop(0)
