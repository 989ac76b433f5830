"""`python -OO` drops docstrings and assertions: the command line works without them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.artifacts import TEXT, source_directory
from tests.support.command import tintc

_ALL = """
import sys
from tintc import cli
source, target, text = sys.argv[1:]
for arguments in (
    ["--help"],
    ["compile", "--help"],
    ["compile", source, "-o", target, "--json"],
    ["run", target, "--text", text, "--json"],
):
    sys.argv = ["tintc", *arguments]
    cli.main()
    print("=====")
"""


@pytest.mark.slow  # two more starts of torch
def test_help_compile_and_run(tmp_path: Path) -> None:
    """All in one process: it starts slowly where Python has not kept its bytecode yet."""
    command = [sys.executable, "-OO", "-c", _ALL]
    arguments = [source_directory(), tmp_path / "without", TEXT]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    found = done.stdout.split("=====\n")
    assert found[:2] == [tintc("--help").out, tintc("compile", "--help").out]
    assert tintc("compile", source_directory(), "-o", tmp_path / "with", "-q").code == 0
    assert found[3] == tintc("run", tmp_path / "with", "--text", TEXT, "--json").out
