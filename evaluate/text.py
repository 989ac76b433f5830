"""Text for language modelling: a file or a hub data set, as tokens, cut into sequences that do not
overlap.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintc.evaluate.hub_rows import USUAL, Access, HubSplit
from tintc.ir.errors import InputError


@dataclass(frozen=True)
class HubText:
    """Where a named data set lies on the hub, and which split is evaluated and which one is chosen
    on. documents: so many are read at most; None for all. titled: whether its rows are lines, and
    documents begin at titles; else each row is a document."""

    path: str
    name: str
    evaluated: str
    chosen_on: str
    documents: int | None = None
    titled: bool = True


HUB_TEXTS = {
    "wikitext-2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "validation"),
    "wikitext-103": HubText("Salesforce/wikitext", "wikitext-103-raw-v1", "test", "validation"),
    "c4": HubText("allenai/c4", "en", "validation", "train", documents=5000, titled=False),
}


@dataclass(frozen=True)
class Text:
    """name: as the user gave it, of a file its last part. sha256: of the text. parts: its
    documents, where these were given one by one."""

    name: str
    text: str
    parts: tuple[str, ...] = field(default=(), compare=False)

    @property
    def documents(self) -> tuple[str, ...]:
        """As they were given, or what begins at titles as WikiText has them (` = Title = `)."""
        return self.parts or titled(self.text)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(data: str, *, choose: bool = False, access: Access = USUAL) -> Text:
    """A UTF-8 text file, a JSONL file of {"text": ...}, or a name out of HUB_TEXTS (choose: its
    split for choosing).

    Documents of a JSONL file or of a hub split are joined by an empty line. Raises InputError for
    what cannot be read or holds no text, SourceError where the hub gives nothing.
    """
    if data in HUB_TEXTS:
        hub = HUB_TEXTS[data]
        split = hub.chosen_on if choose else hub.evaluated
        texts = _hub_texts(hub, split, access)
        parts = () if hub.titled else tuple(texts)
        return Text(f"{data} ({split})", _not_empty(data, _join(texts)), parts)
    path = Path(data)
    if not path.is_file():
        raise InputError(
            f"there is no file {data}; expected a text file, a JSONL file, or one of "
            f"{', '.join(HUB_TEXTS)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{data} cannot be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        return Text(path.name, _not_empty(data, text))
    documents = json_lines(text, data, document_text)
    return Text(path.name, _not_empty(data, _join(documents)), tuple(documents))


_TITLE = re.compile(r"^ = (?!= ).+ = *$", re.MULTILINE)  # sections have more signs


def titled(text: str) -> tuple[str, ...]:
    """The text cut in front of its titles; what stands before the first counts if it says
    anything. Without titles it is one document.
    """
    starts = [found.start() for found in _TITLE.finditer(text)]
    cuts = [0, *(start for start in starts if start), len(text)]
    found = [text[start:end] for start, end in pairwise(cuts)]
    return tuple(part for part in found if part.strip())


def json_lines(text: str, name: str, read: Callable[[Any], Any]) -> list[Any]:
    """What `read` makes of each object. Raises InputError with the line's number if it raises
    KeyError, TypeError or ValueError.
    """
    found = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # str.splitlines would also cut at U+2028, which JSON allows inside a text
        if not line.strip():
            continue
        try:
            found.append(read(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{name}, line {number}: {error or 'no JSON object'}") from None
    return found


def document_text(entry: Any) -> str:
    """The text of a line of a JSONL file. Raises ValueError for what has none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError('expected an object with a "text"')
    return str(entry["text"])


def _join(documents: Iterable[str]) -> str:
    return "\n\n".join(document.strip("\n") for document in documents if document.strip())


def _not_empty(name: str, text: str) -> str:
    if not text.strip():
        raise InputError(f"{name} holds no text")
    return text


def _hub_texts(hub: HubText, split: str, access: Access) -> list[str]:
    # c4 has 300 GB
    found = HubSplit(hub.path, split, "a local file: --data FILE", hub.name, hub.documents)
    (texts,) = found.columns(["text"], access)
    return list(texts)


def token_ids(tokenizer: Any, text: Text) -> Tensor:
    """(N,) token ids of the whole text, without special tokens."""
    return torch.tensor(
        tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"],
        dtype=torch.int64,
    )


def pieces(ids_N: Tensor, length: int, name: str) -> Tensor:
    """(P, length): the text cut up; a shorter rest at its end is left out. Raises InputError for a
    text that is shorter than one.
    """
    count = len(ids_N) // length
    if count == 0:
        raise InputError(
            f"{name} has {len(ids_N)} tokens; expected at least one sequence of {length}"
        )
    return ids_N[: count * length].view(count, length)


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of `limit` out of `count` pieces, at equal distances."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def draw(count: int, limit: int | None, seeds: tuple[int, ...]) -> dict[int, int]:
    """Index of a piece -> the seed that drew it: each seed draws `limit` at random out of those
    that no earlier seed drew.

    None, or more than there are, shares all pieces out.
    """
    each = count // len(seeds) if limit is None else min(limit, count // len(seeds))
    drawn: dict[int, int] = {}
    for seed in seeds:
        left = [index for index in range(count) if index not in drawn]
        drawn |= dict.fromkeys(sorted(random.Random(seed).sample(left, each)), seed)
    return drawn
