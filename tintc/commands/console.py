"""Data on stdout, progress and logs on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tintc import interrupts
from tintc.commands.sheet import Sheet
from tintc.commands.streams import writing
from tintc.ir.json_values import finite
from tintc.ir.named import FETCH


class _Stream(Console):
    """Raises OSError where nothing is written, and forgets what was to be."""

    @contextmanager
    def written(self) -> Iterator[None]:
        """Around a print: rich keeps what it could not write, and would write it with the next."""
        try:
            yield
        except OSError:
            with self.capture():
                pass
            raise

    def on_broken_pipe(self) -> None:
        """rich itself would end the process, with 1."""
        raise BrokenPipeError


class _Data(_Stream):
    """Raises OutputLost, by whomever it is printed to."""

    def print(self, *objects: Any, **options: Any) -> None:
        with writing(), self.written():
            super().print(*objects, **options)

    def out(self, *objects: Any, **options: Any) -> None:
        with writing(), self.written():
            super().out(*objects, **options)


class _Messages(_Stream):
    """Where nothing takes them, messages are lost and work goes on."""

    def print(self, *objects: Any, **options: Any) -> None:
        with suppress(OSError), self.written():
            super().print(*objects, **options)


out = _Data(highlight=False, soft_wrap=True)
err = _Messages(stderr=True, highlight=False, soft_wrap=True)


class Verbosity:
    """Set by -q, -v and --debug."""

    quiet = False
    verbose = False
    debug = False


def configure_logging() -> None:
    """Shows tintc's own log lines on stderr with -v, and warnings as one line each."""
    level = logging.INFO if Verbosity.verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    logging.getLogger("tintc").setLevel(logging.ERROR if Verbosity.quiet else level)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if not Verbosity.quiet:
            err.print(f"warning: {' '.join(str(message).split())}", markup=False)

    warnings.showwarning = show
    if Verbosity.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # compiler/libraries.py reads it


JSON_VERSION = 1  # of what --json prints; a key that goes or means something else makes it 2


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON document on stdout and nothing else. JSON has no NaN and no infinity: they become
    null.
    """
    document = {"json_version": JSON_VERSION, **value}
    text = json.dumps(finite(document), indent=1, allow_nan=False) + "\n"
    with writing():
        sys.stdout.write(text)


def print_line(value: Mapping[str, Any]) -> None:
    """A line of JSON on stdout, whole or not at all."""
    write(json.dumps(finite(dict(value)), allow_nan=False) + "\n")


def write(text: str) -> None:
    """As it is, at once: without colours, and no line is ended."""
    with writing():
        sys.stdout.write(text)
        sys.stdout.flush()


def print_table(sheet: Sheet) -> None:
    """A table, no wider than the terminal."""
    for line in sheet.lines(out.width):
        out.print(line)


def print_text(text: str, style: str | None = None) -> None:
    """A sentence or several, no wider than the terminal."""
    width = out.width
    for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False):
        out.print(line, style=style, markup=False)


def named(rows: Mapping[str, object]) -> Sheet:
    """One row a name, in bold, and what is said of it."""
    sheet = Sheet(bold=True)
    for name, value in rows.items():
        sheet.add_row(name, str(value))
    return sheet


def steps(count: int) -> str:
    """1 step, 2 steps."""
    return f"{count} step{'s' if count > 1 else ''}"


def call_text(facts: Mapping[str, Any]) -> str:
    """How large a call is, and of what its logits are wanted."""
    text = f"{facts['batch']} x {facts['tokens']} tokens, {facts['trained_tokens']} trained"
    return f"{text}, the rest predicted" if facts["predict"] == "rest" else text


def number(value: float) -> str:
    """1234567 -> 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return (
                f"{value / size:.3g} {unit}"
                if value < 999.5 * size
                else f"{value / size:.0f} {unit}"
            )
    return f"{value:g}"


def _leave_room(progress: Progress, stage: str) -> None:
    """Takes the bar away while files are fetched: the hub's client draws its own there, and of two
    on one terminal none can be read.
    """
    if stage == FETCH:
        progress.stop()
    else:
        progress.start()


@contextmanager
def stages(total: int) -> Iterator[Any]:
    """A progress bar over named stages; yields a function to call at the start of each. Silent when
    not a terminal; with -v each stage and its time is a line on stderr.
    """
    with Progress(
        *(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        ),
        console=err,
        transient=True,
        disable=Verbosity.quiet or not err.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=total)
        log, begun = logging.getLogger("tintc"), [""]
        running, since = "", time.monotonic()

        def start(name: str) -> None:
            nonlocal running, since
            interrupts.check()
            if running:
                log.info("%s took %.2f s", running, time.monotonic() - since)
            if name not in (FETCH, begun[-1]):  # fetching is a part of loading
                begun.append(name)
            running, since = name, time.monotonic()
            progress.update(task, description=name, completed=len(begun) - 2)
            _leave_room(progress, name)
            log.info("%s", name)

        yield start
        if running:
            log.info("%s took %.2f s", running, time.monotonic() - since)


@contextmanager
def work() -> Iterator[Any]:
    """A bar with the time left, for long work; yields a function of what is being done, how much of
    it is done, and how much there is.

    Not on a terminal: with -v a line on stderr for every new text, else nothing.
    """
    with Progress(
        *(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ),
        TextColumn("{task.description}"),
        console=err,
        transient=True,
        disable=Verbosity.quiet or not err.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=None)
        last = ""

        def show(text: str, done: int = 0, total: int | None = None) -> None:
            nonlocal last
            interrupts.check()
            progress.update(task, description=text, completed=done, total=total)
            _leave_room(progress, text)
            if text != last:
                logging.getLogger("tintc").info("%s", text)
            last = text

        yield show
