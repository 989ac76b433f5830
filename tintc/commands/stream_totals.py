"""Sums over the scored tokens of a stream, and what is reported of them. Legend: D documents, K
parts of the curve; 2: unmodified model, stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tintc.commands.documents import Document
from tintc.commands.text import perplexity
from tintc.evaluate.byte_offsets import starts_with_text
from tintc.ir.errors import ArtifactError
from tintc.runtime.reading import Piece

_PARTS = 16  # of the curve, at most
_NAMES = ("before", "after")


class Totals:
    """Scored tokens and their losses so far: of each document, and of each part of the positions.

    Sums are in float64, in the order in which the stream reads. A part is a chunk wide, or twice,
    four times, ... as wide, so that few are enough for the longest document.
    """

    def __init__(self, documents: Sequence[Document], chunk: int) -> None:
        self.documents = documents
        self.longest = max(len(document.ids) for document in documents) - 1
        self.width = chunk
        while self.longest > _PARTS * self.width:
            self.width *= 2
        parts = -(-self.longest // self.width)
        self._sums = {
            "scored": torch.zeros(len(documents), dtype=torch.int64),
            "losses": torch.zeros(len(documents), 2, dtype=torch.float64),
            "curve_scored": torch.zeros(parts, dtype=torch.int64),
            "curve_losses": torch.zeros(parts, 2, dtype=torch.float64),
        }

    @property
    def scored(self) -> int:
        """Tokens, over all documents."""
        return int(self._sums["scored"].sum())

    @property
    def expected(self) -> int:
        """The same at the end."""
        return sum(len(document.ids) - 1 for document in self.documents)

    def add(self, piece: Piece) -> None:
        """What a step scored of a document."""
        assert piece.unmodified is not None
        losses_n2 = torch.stack([piece.unmodified, piece.losses], -1).double()
        parts_n = (torch.arange(len(losses_n2)) + piece.start - 1) // self.width
        self._sums["scored"][piece.document] += len(losses_n2)
        self._sums["losses"][piece.document] += losses_n2.sum(0)
        self._sums["curve_scored"].index_add_(0, parts_n, torch.ones_like(parts_n))
        self._sums["curve_losses"].index_add_(0, parts_n, losses_n2)

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes."""
        return self._sums

    def load(self, found: Mapping[str, Tensor]) -> None:
        """Goes on from there. Raises ArtifactError for what does not fit."""
        for name, own in self._sums.items():
            other = found.get(name)
            if other is None or (other.shape, other.dtype) != (own.shape, own.dtype):
                raise ArtifactError(f"{name} is missing, or of another shape")
        self._sums = {name: found[name].clone() for name in self._sums}

    def overall(self) -> dict[str, Any]:
        """Of all documents together. bytes_counted: which bytes the targets have."""
        each = [self._bytes(number) for number in range(len(self.documents))]
        known = [count for count in each if count is not None]
        return {
            "tokens": sum(len(document.ids) for document in self.documents),
            **_row(
                self.scored,
                self._sums["losses"].sum(0).tolist(),
                sum(known) if len(known) == len(each) else None,
            ),
            "bytes_counted": self._bytes_counted(),
        }

    def of_documents(self) -> list[dict[str, Any]]:
        """Of each."""
        return [
            {
                "document": document.number,
                "name": document.name,
                "tokens": len(document.ids),
                **_row(
                    int(self._sums["scored"][number]),
                    self._sums["losses"][number].tolist(),
                    self._bytes(number),
                ),
            }
            for number, document in enumerate(self.documents)
        ]

    def curve(self) -> list[dict[str, Any]]:
        """Mean losses by the position in the text, from 1; parts that nothing reached are not
        there.
        """
        rows = zip(
            self._sums["curve_scored"].tolist(), self._sums["curve_losses"].tolist(), strict=True
        )
        return [
            {
                "first": part * self.width + 1,
                "last": min((part + 1) * self.width, self.longest),
                "scored_tokens": count,
                **_pair("loss", [loss / count for loss in losses]),
            }
            for part, (count, losses) in enumerate(rows)
            if count
        ]

    def _bytes(self, number: int) -> int | None:
        """Of the targets that are scored."""
        spans = self.documents[number].spans
        if spans is None:
            return None
        return spans[int(self._sums["scored"][number])][1] - spans[0][1]

    def _bytes_counted(self) -> str | None:
        spans = [document.spans for document in self.documents]
        if any(each is None for each in spans):
            return None
        without = any(starts_with_text(each) for each in spans if each is not None)
        return "all but those of the first token" if without else "all"


def _row(scored: int, losses_2: list[float], count: int | None) -> dict[str, Any]:
    """Of a document or of all; None for what no token or no byte gives."""
    means = [loss / scored if scored else None for loss in losses_2]
    return {
        "scored_tokens": scored,
        "bytes": count,
        **_pair("nll", losses_2),
        **_pair("loss", means),
        **_pair("perplexity", [None if mean is None else perplexity(mean) for mean in means]),
        **_pair(
            "bits_per_byte", [loss / math.log(2) / count if count else None for loss in losses_2]
        ),
    }


def _pair(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    return {f"{name}_{when}": value for when, value in zip(_NAMES, values, strict=True)}
