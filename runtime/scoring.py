"""Whole documents through a stream: the loop that `Stream.step` is called in.

Legend: B documents, N tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tintc.ir.errors import InputError
from tintc.runtime.reading import Progress, Rows
from tintc.runtime.streaming import Stream


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
    """A text that a stream has read. losses, unmodified: of its targets, a part each step."""

    number: int
    losses: list[Tensor] = field(default_factory=list)
    unmodified: list[Tensor] = field(default_factory=list)


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
    rows = Rows(stream, documents, beside)
    found: dict[int, Document] = {}
    while not rows.is_done:
        for piece in rows.step(progress):
            document = found.setdefault(piece.document, Document(piece.document))
            document.losses.append(piece.losses)
            if piece.unmodified is not None:
                document.unmodified.append(piece.unmodified)
            if piece.is_last:
                yield found.pop(piece.document)


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
