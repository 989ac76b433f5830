"""Standard streams that are closed, full, or read by nobody."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.artifacts import artifact
from tests.support.command import process
from tests.support.grid import some
from tintc import cli
from tintc.commands.console import Verbosity

COMMANDS = [
    "env",
    "env --json",
    "--help",
    "eval lm --help",
    "--version",
    "inspect ARTIFACT",
    "inspect ARTIFACT --json",
    "inspect ARTIFACT --stage lowered",
    "inspect ARTIFACT --stage lowered --format code",
    "inspect ARTIFACT --stage lowered --format dot",
    "run ARTIFACT --json --text the_river_and_the_sea",
    "run ARTIFACT --text the_river_and_the_sea --generate 2",
]


@contextmanager
def full() -> Iterator[io.TextIOWrapper]:
    file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 (closing it may fail)
    yield file
    with suppress(OSError):
        file.close()


@contextmanager
def unread() -> Iterator[io.TextIOWrapper]:
    """A pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "w", encoding="utf-8")
    yield file
    with suppress(OSError):
        file.close()


def run(command: str, stdout: Any) -> tuple[int, str]:
    """(exit code, standard error) of a command that writes there."""
    words = [str(artifact()) if word == "ARTIFACT" else word for word in command.split()]
    err, code = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["tintc", *words]),
        mock.patch.object(sys, "stdout", stdout),
        mock.patch.object(sys, "stderr", err),
        mock.patch.multiple(Verbosity, quiet=False, verbose=False, debug=False),
    ):
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0
    return code, err.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", COMMANDS)
def test_full(command: str) -> None:
    with full() as stdout:
        found = run(command, stdout)
    assert found == (1, "error: cannot write to standard output: No space left on device\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_closed(command: str) -> None:
    """What Python has for it is None. Nothing is computed first."""
    assert run(command, None) == (1, "error: cannot write to standard output: it is closed\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_that_nobody_reads_is_no_failure(command: str) -> None:
    with unread() as stdout:
        assert run(command, stdout) == (0, "")


@pytest.mark.parametrize("stream", [full, unread])
def test_a_failure_is_one_wherever_messages_go(stream: Any) -> None:
    with (
        stream() as stderr,
        mock.patch.object(sys, "stderr", stderr),
        mock.patch.object(sys, "argv", ["tintc", "nonsense"]),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    assert ended.value.code == 2


FROM_A_SHELL = [
    ("env > /dev/full", 1, "", "error: cannot write to standard output: No space left"),
    ("env >&-", 1, "", "error: cannot write to standard output: it is closed"),
    ("env --json | true", 0, "", ""),
    ("run ARTIFACT - <&-", 2, "", "error: cannot read standard input: it is closed"),
    ("--version <&- 2>&-", 0, "tintc ", ""),
]


@some(
    ("shell", "code", "out", "err"),
    FROM_A_SHELL,
    default=[row for row in FROM_A_SHELL if row[0] in ("env > /dev/full", "env --json | true")],
)
def test_from_a_shell(shell: str, code: int, out: str, err: str) -> None:
    """In a process of its own, which also says nothing when it ends."""
    line = shell.replace("ARTIFACT", str(artifact()))
    script = f'"{sys.executable}" -m tintc {line}'
    before, _, after = script.partition("|")
    script = f'{before} | {after}; exit "${{PIPESTATUS[0]}}"' if after else script
    done = process(
        script,
        code="import subprocess, sys; sys.exit(subprocess.call(['bash', '-c', sys.argv[1]]))",
    )
    assert (done.returncode, done.stderr.count("\n")) == (code, 1 if err else 0), done
    assert done.stderr.startswith(err)
    assert done.stdout.startswith(out)
