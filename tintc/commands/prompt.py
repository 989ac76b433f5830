"""A text of which only as much is read, and made tokens of, as is asked for."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tintc.ir.errors import InputError

_CHUNK = 1 << 20  # bytes that are read at a time
_LIKELY = 8  # characters of a token, and more than most have

Tokenize = Callable[[str], list[int]]


class Prompt:
    """A text without the space around it. name, kind: in messages. chunks: its parts, read when
    they are needed. offset: bytes of UTF-8 in front of what is left of it. Raises InputError, as
    everything here does, for what cannot be read or is empty.
    """

    def __init__(self, name: str, chunks: Iterator[str], kind: str = "text") -> None:
        self._name, self._chunks, self.kind = name, chunks, kind
        self._read, self.is_whole = "", False
        self.offset = 0
        self._grow(1)
        if not self._read:
            expected = "a few sentences" if kind == "text" else "some text"
            raise InputError(f"the {kind} is empty; expected {expected}")

    @classmethod
    def of_text(cls, text: str, name: str = "--text", kind: str = "text") -> Prompt:
        try:
            text.encode("utf-8")  # what a shell passes may hold bytes that are no UTF-8
        except UnicodeError as error:
            raise _unreadable(name, error) from error
        return cls(name, iter([text]), kind)

    @classmethod
    def of_file(cls, file: str) -> Prompt:
        """file: a path, or - for standard input. Refuses JSON lines."""
        found = cls.of_any_file(file)
        if is_json_lines(file) or found._begins_with_an_object():
            raise InputError(
                f"{found._name} holds JSON objects, not one plain text, and their braces would be "
                "trained on; pass the text alone (--text TEXT takes anything as it is); tintc run "
                "DIR --file FILE.jsonl and tintc eval lm --data FILE.jsonl read documents"
            )
        return found

    @classmethod
    def of_any_file(cls, file: str, kind: str = "text") -> Prompt:
        """The same of whatever text the file holds."""
        name = "standard input" if file == "-" else file
        chunks = _standard_input() if file == "-" else _file(Path(file).expanduser())
        return cls(name, chunks, kind)

    def ids(self, tokenize: Tokenize, count: int | None) -> list[int]:
        """The first `count` token ids, or those of the whole text if it has fewer or `count` is
        None; `is_whole` then says so.

        A part is made tokens of, and one that is twice as long and a character: where the first
        tokens of both are the same, where it was cut makes no difference to them.
        """
        size, before = 0 if count is None else _LIKELY * count, None
        while count is not None:
            self._grow(size + 1)
            if len(self._read) <= size:
                break
            found = tokenize(self._read[:size])[:count]
            if len(found) == count and found == before:
                self.is_whole = False
                return found
            size, before = 2 * size + 1, found
        self._grow(None)
        found, self.is_whole = tokenize(self._read.rstrip()), True
        if count is not None and len(found) > count:
            found, self.is_whole = found[:count], False
        return found

    def continued(self, tokenize: Tokenize, longest: int | None) -> list[int]:
        """All token ids of what a simulator of so many positions goes on with. Raises InputError
        for more than that, and for none.
        """
        enough = None if longest is None else longest + 1  # to see that there are too many
        ids = self.ids(tokenize, enough)
        if longest is not None and len(ids) > longest:
            count = f"{len(ids)}" if self.is_whole else f"more than {longest}"
            raise InputError(
                f"the prompt has {count} tokens; this simulator takes {longest}: pass a shorter one"
            )
        if not ids:
            raise InputError("the prompt has no tokens; expected some text")
        return ids

    def _grow(self, size: int | None) -> None:
        """Reads until there are so many characters, or all for None."""
        parts, held = [self._read], len(self._read)
        try:
            while size is None or held < size:
                part = next(self._chunks, None)
                if part is None:
                    break
                if not held:
                    part = self._without_what_is_before(part)
                parts.append(part)
                held += len(part)
        except (OSError, UnicodeError) as error:
            raise _unreadable(self._name, error) from error
        self._read = "".join(parts)

    def _without_what_is_before(self, part: str) -> str:
        """A part without space in front, nor the mark that some editors put there."""
        found = (part if self.offset else part.removeprefix("\ufeff")).lstrip()
        self.offset += len(part[: len(part) - len(found)].encode())
        return found

    def _begins_with_an_object(self) -> bool:
        try:
            return isinstance(json.loads(self._read.partition("\n")[0]), dict)
        except ValueError:
            return False


def is_json_lines(file: str) -> bool:
    """Whether a name says that each line is a JSON object."""
    return Path(file).suffix.lower() in (".jsonl", ".ndjson")


def _file(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        yield from _decoded(file)


def _standard_input() -> Iterator[str]:
    if sys.stdin is None:
        raise OSError(None, "it is closed")
    yield from _decoded(sys.stdin.buffer)


def _decoded(file: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    while data := file.read(_CHUNK):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _unreadable(name: str, error: OSError | UnicodeError) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    return InputError(f"cannot read {name}: {reason}")
