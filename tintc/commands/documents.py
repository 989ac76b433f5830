"""The documents that `tintc run` reads: one text, a directory of *.txt files, or JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintc.commands.loaded import tokenizing
from tintc.commands.prompt import Prompt
from tintc.commands.text import Reading
from tintc.evaluate.byte_offsets import Span, byte_spans
from tintc.evaluate.text import document_text
from tintc.ir.errors import InputError, TintcError
from tintc.runtime.simulator import Simulator


@dataclass(frozen=True)
class Document:
    """number: its place among all that the source has, from 0. name: a file, or a line of one.
    ids: (N,). content: its text in UTF-8, `offset` bytes behind where it begins in the source.
    spans: of each token in `content`; None where the tokenizer gives no offsets.
    """

    number: int
    name: str
    ids: Tensor
    content: bytes
    offset: int
    spans: list[Span] | None


@dataclass(frozen=True)
class Refused:
    """A document that cannot be read or scored, and why."""

    number: int
    name: str
    error: TintcError


Read = Callable[[], Prompt]


def read_documents(
    simulator: Simulator,
    asked: Reading,
    limit: int | None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Document | Refused]:
    """Every document as tokens, in the order of the source. limit: tokens that a document may have.

    Of several documents, one that cannot be used is `Refused`. Raises InputError for a source that
    cannot be read or has no document, and for a single text that cannot be used.
    """
    asked.check()
    tokenizing(simulator)  # refuses one without a tokenizer before anything is read
    if not asked.is_many:
        name = "--text" if asked.file is None else asked.file
        return [_document(simulator, asked, limit, 0, name, asked.prompt())]
    found: list[Document | Refused] = []
    for number, (name, read) in enumerate(_sources(asked.file or "")):
        progress(f"reading {name}")
        try:
            found.append(_document(simulator, asked, limit, number, name, read()))
        except InputError as error:
            found.append(Refused(number, name, error))
    if not found:
        raise InputError(f"{asked.file} holds no documents; expected a line for each")
    return found


def digest_of_documents(documents: Sequence[Document]) -> str:
    """Of tokens and texts, whatever their names."""
    found = hashlib.sha256()
    for document in documents:
        ids = document.ids.numpy().tobytes()
        sizes = [document.number, document.offset, len(ids), len(document.content)]
        found.update(json.dumps(sizes).encode() + ids + document.content)
    return found.hexdigest()


def fail_for(refused: Sequence[Refused], count: int) -> None:
    """Raises the first error, where there is one, with how many of `count` documents failed."""
    if refused:
        first = refused[0]
        raise type(first.error)(
            f"{len(refused)} of {count} documents failed; the first is {first.name}: {first.error}"
        )


def _sources(file: str) -> Iterator[tuple[str, Read]]:
    path = Path(file).expanduser()
    if path.is_dir():
        files = sorted(each for each in path.glob("*.txt") if each.is_file())
        if not files:
            raise InputError(f"{file} holds no *.txt file; expected one for each document")
        for each in files:
            yield each.name, partial(Prompt.of_file, str(each))
        return
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    name = f"{path.name}, line {number}"
                    yield name, partial(_of_line, line, name)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _of_line(line: bytes, name: str) -> Prompt:
    try:
        text = document_text(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise InputError("it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise InputError(f"it is no JSON object: {error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    return Prompt.of_text(text, name)


def _document(
    simulator: Simulator, asked: Reading, limit: int | None, number: int, name: str, prompt: Prompt
) -> Document:
    tokenizer = simulator.tokenizer
    read: dict[str, Any] = {}

    def tokenize(text: str) -> list[int]:
        spans = None
        if tokenizer.is_fast:
            ids, spans = byte_spans(tokenizer, text)
        else:
            ids = tokenizer(text, verbose=False)["input_ids"]
        read.update(text=text, spans=spans)
        return ids

    ids = asked.ids(prompt, tokenize, limit)
    largest, vocabulary = max(ids), simulator.program.facts.vocab_size
    if largest >= vocabulary:
        raise InputError(
            f"the text has token {largest}; this model's tokens are 0 to {vocabulary - 1}"
        )
    content, spans = read["text"].encode(), read["spans"]
    if spans is not None:
        spans = spans[: len(ids)]
        content = content[: spans[-1][1]]
    return Document(number, name, torch.tensor(ids), content, prompt.offset, spans)
