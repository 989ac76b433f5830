"""tintc run --stream: score each chunk of a text, then train on it. TINT.md section 8."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintc.commands import console, stream_report
from tintc.commands.documents import (
    Document,
    Refused,
    digest_of_documents,
    fail_for,
    read_documents,
)
from tintc.commands.loaded import load_at_rate
from tintc.commands.scores import ScoreFile, lines_of
from tintc.commands.showing import Showing, Told
from tintc.commands.stream_flags import StreamFlags
from tintc.commands.stream_totals import Totals
from tintc.commands.text import Reading
from tintc.compiler.stream_state import Stopped, Written, read_state, write_state
from tintc.ir.errors import ArtifactError, InputError, NumericalError, UsageError
from tintc.runtime.reading import Piece, Rows
from tintc.runtime.showing.of_outputs import decoding
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.streaming import Stream, StreamOverflow

_WORK_PER_SAVE = 19  # seconds of work for each that a save takes: at most 5 % goes into saving

Show = Callable[[str, int, int], None]


def run(
    path: Path,
    asked: Reading,
    flags: StreamFlags,
    showing: Showing,
    device: str | None,
    dtype: torch.dtype | None,
    *,
    as_json: bool,
) -> None:
    """Prints what the stream makes of each document, and of all, beside the unmodified model."""
    simulator = load_at_rate(path, asked.inner_lr, device, dtype)
    settings = flags.settings()
    settings.check(simulator.program.facts.longest)
    with console.work() as show:
        found = read_documents(simulator, asked, None, show)
        documents = [each for each in found if isinstance(each, Document)]
        refused = [each for each in found if isinstance(each, Refused)]
        if not documents:
            fail_for(refused, len(found))
        batch = min(flags.side_by_side, len(documents))
        keep = bool(showing.names())
        job = Job(simulator, documents, settings, batch, flags.scores, flags.state, keep=keep)
        failure = job.run(show)
    told = _told(showing, job, simulator) if keep else Told()
    report = stream_report.report(simulator, settings, batch, job.totals, refused)
    if failure is not None:
        report["stopped"] = {"chunk": job.steps, "reason": str(failure)}
    report |= told.values()
    stream_report.show(report, as_json)
    if not as_json:
        told.print()
    if failure is not None:
        raise failure
    fail_for(refused, len(found))


def _told(showing: Showing, job: Job, simulator: Simulator) -> Told:
    """Of the one document, all of which is predicted before it is trained on."""
    before, after = [], []
    for piece in job.pieces:
        assert piece.unmodified is not None
        before += piece.unmodified.tolist()
        after += piece.losses.tolist()
    ids = job.documents[0].ids.tolist()
    return showing.told(ids, decoding(simulator.tokenizer), 0, before, after)


class Job:
    """Documents on their way through a stream and, beside it, through the unmodified model in the
    same windows. steps: so many are behind it. pieces: what this run scored, if it is to `keep`
    them: memory grows with the text then. scores, state: files, or None.

    A state that exists is gone on from. Raises UsageError for the state of something else,
    ArtifactError for a file that is damaged.
    """

    def __init__(
        self,
        simulator: Simulator,
        documents: list[Document],
        settings: StreamSettings,
        batch: int,
        scores: Path | None,
        state: Path | None,
        *,
        keep: bool = False,
    ) -> None:
        self.documents, self.keep = documents, keep
        self.streams = {
            "stream": simulator.stream(batch, **asdict(settings)),
            "unmodified": Stream(simulator, batch, settings, learns=False),
        }
        ids = [document.ids for document in documents]
        self.rows = Rows(self.streams["stream"], ids, self.streams["unmodified"])
        self.totals, self.steps = Totals(documents, settings.chunk), 0
        self.pieces: list[Piece] = []
        self._texts = digest_of_documents(documents)
        self._state = None if state is None else state.expanduser()
        self._written = None if scores is None else Written(bytes=0, crc32=0)
        self._saving_s, self._saved_at = 0.0, 0.0
        before = None
        if self._state is not None and self._state.exists():
            before = self._go_on(self._state)
        else:
            if scores is not None:
                ScoreFile.check_new(scores)
            self._save()  # so that a file of scores always has a state that knows of it
        self._scores = (
            None if scores is None else ScoreFile(scores, None if before is None else before.scores)
        )

    def run(self, show: Show) -> NumericalError | None:
        """To the end, or to losses that are not finite: these are returned, and what was scored
        before stays. The state is saved after a chunk, but never for more than 5 % of the time, at
        the end, and when the run is interrupted between two chunks.
        """
        is_whole = True  # what is saved: everything of a chunk, or nothing of it
        try:
            while not self.rows.is_done:
                show(f"chunk {self.steps + 1}", self.totals.scored, self.totals.expected)
                is_whole = False
                self._step()
                is_whole = True
                if time.monotonic() - self._saved_at > _WORK_PER_SAVE * self._saving_s:
                    self._save()
            self._save()
        except StreamOverflow as error:
            document = self.rows.reading[error.row]
            assert document is not None
            return NumericalError(f"{self.documents[document].name}: {error}")
        except KeyboardInterrupt:
            if is_whole:
                self._save()
            raise
        finally:
            if self._scores is not None:
                self._scores.close()
        return None

    def _step(self) -> None:
        for piece in self.rows.step():
            self.totals.add(piece)
            if self.keep:
                self.pieces.append(piece)
            if self._scores is not None:
                self._scores.add(lines_of(self.documents[piece.document], piece))
                self._written = self._scores.written
        self.steps += 1

    # The state

    def _save(self) -> None:
        if self._state is None:
            return
        start = time.monotonic()
        parts: dict[str, Mapping[str, Tensor]] = {
            **{name: stream.state_dict() for name, stream in self.streams.items()},
            "totals": self.totals.tensors(),
        }
        tensors = {
            f"{part}/{name}": value
            for part, values in parts.items()
            for name, value in values.items()
        }
        about = Stopped(texts=self._texts, steps=self.steps, scores=self._written)
        write_state(self._state, tensors, about)
        self._saved_at = time.monotonic()
        self._saving_s = self._saved_at - start

    def _go_on(self, path: Path) -> Stopped:
        tensors, about = read_state(path)
        if about.texts != self._texts:
            raise UsageError(
                f"{path} is the state of a stream over other texts; expected the same command, or "
                "another --state"
            )
        if (about.scores is None) != (self._written is None):
            got = "with" if about.scores is not None else "without"
            raise UsageError(
                f"{path} is the state of a stream {got} --scores; expected the same command, or "
                "another --state"
            )
        parts: dict[str, dict[str, Any]] = {name: {} for name in (*self.streams, "totals")}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        try:
            for name, stream in self.streams.items():
                stream.load_state_dict(parts[name])
            self.totals.load(parts["totals"])
            self.rows.skip(about.steps)
        except InputError as error:
            raise ArtifactError(f"{path} is malformed: {error}") from error
        except (UsageError, ArtifactError) as error:
            raise type(error)(f"{path}: {error}") from error
        if {stream.chunks for stream in self.streams.values()} != {about.steps}:
            raise ArtifactError(f"{path} is malformed: its parts are of different chunks")
        self.steps, self._written = about.steps, about.scores
        return about
