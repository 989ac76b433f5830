"""Commands that end at a random moment: what they write is whole or not there, Ctrl-C is always
called so, and the next run leaves nothing behind that belongs to a dead one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import tintc
from tests.fuzz.victim import PATIENCE_S
from tests.support.artifacts import artifact
from tests.support.counted import counted

# seconds: Python has to be up, and the longest command is done
FIRST, LAST = 0.4, 9.0
WHAT = ("compile", "export", "eval")


def target(what: str, folder: Path) -> Path:
    return folder / ("out.onnx" if what == "export" else "out")


def command(what: str, folder: Path) -> list[str]:
    """A command that writes the target."""
    written = str(target(what, folder))
    if what == "compile":
        return ["compile", "tiny-opt", "-o", written, "--force"]
    if what == "export":
        return ["export", str(artifact()), "--onnx", written, "--force"]
    text = Path(__file__).parents[2] / "examples" / "paragraph.txt"
    sizes = ["--tokens", "64", "--limit", "2", "--choosing", "1", "--seeds", "1"]
    return ["eval", "lm", "tiny-opt", "--data", str(text), *sizes, "-o", written]


def assert_whole(what: str, path: Path) -> None:
    """What stands at the target can be used."""
    if what == "compile":
        tintc.load(path)
    elif what == "export":
        onnx.load(path)
    elif (
        units := path / "units.jsonl"
    ).exists():  # a directory to go on from, maybe without a unit
        for line in units.read_text().splitlines()[:-1]:
            json.loads(line)


def start(what: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-m", "tintc", *command(what, folder), "-q"]
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def stopped(what: str, folder: Path, how: signal.Signals, after: float) -> tuple[int, str]:
    """Exit code and standard error of a command that is sent a signal."""
    process = start(what, folder)
    try:
        said = process.communicate(timeout=after)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(how)
        try:
            said = process.communicate(timeout=PATIENCE_S)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, said


@pytest.mark.first_by_default
@pytest.mark.cases(20, 5)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_nothing_half_written(how: signal.Signals, cases: range, tmp_path: Path) -> None:
    what = WHAT[cases.start // 5 % len(WHAT)]
    written = target(what, tmp_path)
    for case in cases:
        after = random.Random(case).uniform(FIRST, LAST)
        code, said = stopped(what, tmp_path, how, after)
        if how is signal.SIGINT and code != 0:
            assert (code, said.strip().splitlines()[-1:]) == (130, ["error: interrupted"]), (
                after,
                said,
            )
            assert "Traceback" not in said
            assert [path.name for path in tmp_path.iterdir() if path != written] == []
        counted(f"{how.name} of {what}", "ran" if code == 0 else "refused")
        if written.exists():
            assert_whole(what, written)
    process = start(what, tmp_path)
    said = process.communicate(timeout=10 * PATIENCE_S)[1]
    assert process.returncode == 0, said
    assert list(tmp_path.iterdir()) == [written]
    assert_whole(what, written)
    if what == "eval":
        assert (written / "units.jsonl").exists()
