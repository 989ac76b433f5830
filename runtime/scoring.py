"""Whole documents through a stream: the loop that `Stream.step` is called in.

Legend: B documents, N tokens of the longest, C targets of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tintc.ir.errors import InputError
from tintc.runtime.streaming import Stream, StreamScores

Progress = Callable[[int, StreamScores], None]  # number of the chunk, and its scores


@dataclass(frozen=True)
class StreamOutput:
    """losses: (B, N - 1), at position t that of token t + 1, before it was trained on; NaN where
    there is no such token. unmodified_losses: the same of the unmodified model in the same windows,
    if asked for.
    """

    losses: Tensor
    unmodified_losses: Tensor | None = None


@dataclass
class Document:
    """A text on its way through a row of a stream. losses, unmodified: of the targets so far."""

    number: int
    tokens: Tensor  # (n,)
    read: int = 0
    losses: list[Tensor] = field(default_factory=list)
    unmodified: list[Tensor] = field(default_factory=list)

    def take(self, chunk: int) -> Tensor:
        """Its next tokens: those of one chunk of targets."""
        count = chunk if self.read else chunk + 1
        taken = self.tokens[self.read : self.read + count]
        self.read += len(taken)
        return taken

    @property
    def is_read(self) -> bool:
        return self.read >= len(self.tokens)


def read_documents(
    stream: Stream,
    documents: list[Tensor],
    beside: Stream | None = None,
    progress: Progress | None = None,
) -> Iterator[Document]:
    """Each document when it is read to its end, with its losses.

    Row b of the stream gets documents b, b + B, ... beside: a stream of the unmodified model, which
    reads the same windows. Raises InputError for a document without a target, StreamOverflow for
    losses that are not finite.
    """
    for number, tokens in enumerate(documents):
        if tokens.ndim != 1 or len(tokens) < 2:
            raise InputError(
                f"document {number} has shape {tuple(tokens.shape)}; expected at least two tokens, "
                "of which the second is the first target"
            )
    queues = [
        [Document(number, documents[number]) for number in range(row, len(documents), stream.batch)]
        for row in range(stream.batch)
    ]
    while any(queues):
        yield from _one_step(stream, queues, beside, progress)


def _one_step(
    stream: Stream,
    queues: list[list[Document]],
    beside: Stream | None,
    progress: Progress | None,
) -> list[Document]:
    """The documents that end here, in the order of their rows."""
    reading = [queue[0] if queue else None for queue in queues]
    begins = torch.tensor([document is not None and not document.read for document in reading])
    parts = [
        document.take(stream.settings.chunk) if document else torch.zeros(0, dtype=torch.int64)
        for document in reading
    ]
    ids_Bn = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts])
    mask_Bn = torch.arange(ids_Bn.shape[1]) < lengths.unsqueeze(-1)
    scores = stream.step(ids_Bn, mask_Bn, begins)
    plain = None if beside is None else beside.step(ids_Bn, mask_Bn, begins)
    if progress is not None:
        progress(stream.chunks - 1, scores)
    done = []
    for row, document in enumerate(reading):
        if document is None:
            continue
        targets = slice(1 if begins[row] else 0, len(parts[row]))
        document.losses.append(scores.losses[row, targets].cpu())
        if plain is not None:
            document.unmodified.append(plain.losses[row, targets].cpu())
        if document.is_read:
            done.append(queues[row].pop(0))
    return done


def score_documents(
    stream: Stream,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    beside: Stream | None = None,
    progress: Progress | None = None,
) -> StreamOutput:
    """One document a row, (B, N). attention_mask: (B, N), 0 at padding on either side."""
    mask_BN = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask_BN.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask_BN.shape)}; expected {tuple(input_ids.shape)}"
        )
    columns = [row.nonzero()[:, 0] for row in mask_BN.cpu()]
    documents = [input_ids[b, where.to(input_ids.device)] for b, where in enumerate(columns)]
    nothing = torch.full(
        (len(documents), input_ids.shape[1] - 1), float("nan"), dtype=stream.loss_dtype
    )
    losses, plain = nothing.clone(), nothing.clone()
    for document in read_documents(stream, documents, beside, progress):
        where = columns[document.number][1:] - 1
        losses[document.number, where] = torch.cat(document.losses)
        if beside is not None:
            plain[document.number, where] = torch.cat(document.unmodified)
    device = stream.simulator.device
    return StreamOutput(losses.to(device), None if beside is None else plain.to(device))
