"""The file of `--scores`: one JSON line a scored token, appended chunk by chunk.

It grows while the stream runs, so it is not replaced at the end: whoever reads it meanwhile, or
after a kill, has whole lines, but for the last where the kill came while it was written. What the
state does not know of is cut off when the stream goes on.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tintc.commands.documents import Document
from tintc.compiler.stream_state import Written
from tintc.ir.errors import ArtifactError, UsageError
from tintc.runtime.reading import Piece


class ScoreFile:
    """written: what an earlier run is known to have written; None for a new file. Raises UsageError
    for a new file that exists, ArtifactError for one that is not as it was left, or cannot be
    written.
    """

    def __init__(self, path: Path, written: Written | None) -> None:
        self.path = path.expanduser()
        self._bytes, self._crc32 = 0, 0
        if written is None:
            self.check_new(path)
        with self._reporting():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        if written is not None:
            try:
                self._go_on(written)
            except ArtifactError:
                self.close()
                raise

    @staticmethod
    def check_new(path: Path) -> None:
        """Raises UsageError for a file that exists."""
        if path.expanduser().exists():
            raise UsageError(f"{path} exists; remove it, or write the scores to another file")

    @property
    def written(self) -> Written:
        """What `written` of a later run may be."""
        return Written(bytes=self._bytes, crc32=self._crc32)

    def add(self, lines: bytes) -> None:
        """Appends whole lines."""
        with self._reporting():
            left = memoryview(lines)
            while left:
                left = left[self._file.write(left) :]
        self._bytes += len(lines)
        self._crc32 = zlib.crc32(lines, self._crc32)

    def close(self) -> None:
        self._file.close()

    def _go_on(self, written: Written) -> None:
        with self._reporting():
            self._file.seek(0)
            left, crc32 = written.bytes, 0
            while left and (part := self._file.read(min(left, 1 << 20))):
                left, crc32 = left - len(part), zlib.crc32(part, crc32)
            if left or crc32 != written.crc32:
                raise ArtifactError(
                    f"{self.path} does not hold what the state says was written "
                    f"({written.bytes:,} bytes); put it back, or start anew without either file"
                )
            self._file.truncate(written.bytes)
        self._bytes, self._crc32 = written.bytes, written.crc32

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from error


def lines_of(document: Document, piece: Piece) -> bytes:
    """A line for each target. text, byte: what the document has there, and where in its UTF-8."""
    assert piece.unmodified is not None
    lines = []
    pairs = zip(piece.unmodified.tolist(), piece.losses.tolist(), strict=True)
    for position, (before, after) in enumerate(pairs, piece.start):
        text, byte = None, None
        if document.spans is not None:
            start, stop = document.spans[position]
            text = document.content[start:stop].decode("utf-8", "replace")
            byte = document.offset + start
        entry = {
            "document": document.number,
            "position": position,
            "token": int(document.ids[position]),
            "text": text,
            "byte": byte,
            "loss_before": before,
            "loss_after": after,
        }
        lines.append(json.dumps(entry) + "\n")
    return "".join(lines).encode()
