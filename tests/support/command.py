"""Runs the command line: in this process, which is quick, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from tintc import cli
from tintc.commands import console
from tintc.commands.console import JSON_VERSION, Verbosity


@contextlib.contextmanager
def as_terminal() -> Iterator[None]:
    """Bars are drawn: the console decides when it is made whether it is at a terminal."""
    with mock.patch.object(console, "err", Console(stderr=True, highlight=False, soft_wrap=True)):
        yield


@dataclass(frozen=True)
class Finished:
    """Exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it must be, but for its version."""
        found = json.loads(self.out)
        assert found.pop("json_version") == JSON_VERSION
        return found

    def refused(self, code: int) -> str:
        """The one line on standard error of a command that failed with this code and printed
        nothing else.
        """
        assert (self.code, self.out) == (code, ""), self
        assert self.err.startswith("error: "), self
        assert self.err.count("\n") == 1, self
        assert "please report it" not in self.err, self
        return self.err


class Terminal(io.StringIO):
    """Takes text as a terminal would."""

    def isatty(self) -> bool:
        return True


def tintc(
    *arguments: object, stdin: bytes = b"", terminal: bool = False, columns: int = 80
) -> Finished:
    """`tintc ARGUMENTS` in this process. terminal: whether standard error is one. columns: of the
    terminal.
    """
    out, err = io.StringIO(), Terminal() if terminal else io.StringIO()
    code: Any = None
    with (
        mock.patch.object(sys, "argv", ["tintc", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")),
        mock.patch.multiple(Verbosity, quiet=False, verbose=False, debug=False),
        mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        as_terminal() if terminal else contextlib.nullcontext(),
    ):
        warnings.simplefilter("default")
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code
    return Finished(code or 0, out.getvalue(), err.getvalue())


def process(
    *arguments: object, code: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`tintc ARGUMENTS`, or some Python code with these arguments, in a process of its own that has
    no network.
    """
    start = ["-c", code] if code is not None else ["-m", "tintc"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
        **options,
    )
