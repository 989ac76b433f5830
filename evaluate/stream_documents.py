"""Which documents of a text are streamed, and how many bytes their targets have."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tintc.evaluate.byte_offsets import byte_spans, starts_with_text
from tintc.evaluate.text import Text
from tintc.ir.errors import InputError

_TITLE = 60  # characters of a first line


@dataclass(frozen=True)
class Passage:
    """The beginning of a document. number: in its text, from 0. title: its first line. ids_N: its
    tokens, with those that the tokenizer adds. bytes: UTF-8 bytes of its targets, which are all
    tokens but the first. first_is_text: whether that first one holds bytes of the text, which do
    not count.
    """

    number: int
    title: str
    ids_N: Tensor
    bytes: int
    first_is_text: bool

    @property
    def targets(self) -> int:
        return len(self.ids_N) - 1

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids_N.numpy().tobytes()).hexdigest()

    @property
    def name(self) -> str:
        """As messages have it."""
        return f"document {self.number} ({self.title!r})"

    def described(self) -> dict[str, Any]:
        """What reports say of it."""
        return {
            "number": self.number,
            "title": self.title,
            "targets": self.targets,
            "bytes": self.bytes,
        }


def longest(
    tokenizer: Any, documents: list[tuple[int, str]], limit: int | None, tokens: int | None
) -> list[Passage]:
    """The first `tokens` tokens of the `limit` longest documents, in the order of the text. Raises
    InputError for one of them that has no target.
    """
    spans = [(number, text, *byte_spans(tokenizer, text)) for number, text in documents]
    by_length = sorted(spans, key=lambda each: (-len(each[2]), each[0]))
    found = []
    for number, text, ids, where in sorted(by_length[:limit], key=lambda each: each[0]):
        kept = slice(1, tokens)
        passage = Passage(
            number,
            text.strip().partition("\n")[0][:_TITLE],
            torch.tensor(ids[:tokens], dtype=torch.int64),
            sum(stop - start for start, stop in where[kept]),
            starts_with_text(where),
        )
        if passage.targets < 1:
            raise InputError(
                f"{passage.name} has {len(ids)} tokens; expected at least two, of which the second "
                "is the first target: leave it out, or choose fewer documents"
            )
        found.append(passage)
    return found


def share_out(
    text: Text, choosing: Text | None, chooses: bool
) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(documents that are evaluated, documents that rates are chosen on), with their numbers: of
    another text, or the first quarter of this one, which is then left out. Raises InputError where
    that is the same text or nothing is left.
    """
    own = list(enumerate(text.documents))
    if not chooses:
        return own, []
    if choosing is not None:
        if choosing.sha256 == text.sha256:
            raise InputError(
                f"{choosing.name} is the evaluated text itself; expected other text to choose the "
                "learning rate on"
            )
        return own, list(enumerate(choosing.documents))
    if len(own) < 2:
        raise InputError(
            f"{text.name} has one document, and learning rates are chosen on others; expected "
            "another text to choose on, or an inner_lr"
        )
    first = max(1, len(own) // 4)
    return own[first:], own[:first]
