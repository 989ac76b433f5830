"""Ctrl-C at any moment ends in one line and exit code 130."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import tintc as package
from tests.support.command import Finished, process, tintc
from tests.support.nano import nano
from tintc import interrupts
from tintc.commands import console, env
from tintc.ir.errors import TintcError


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    interrupts.forget()


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def hidden() -> NoReturn:
    """What the initialization of an extension module makes of it."""
    with contextlib.suppress(KeyboardInterrupt):
        press()
    raise ImportError("initialization failed")


def kept() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        press()


def refused() -> NoReturn:
    try:
        press()
    except KeyboardInterrupt:
        raise TintcError("torch.export cannot trace it") from None
    raise AssertionError


@pytest.mark.parametrize("what", [press, hidden, kept, refused])
def test_whatever_a_library_makes_of_it(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "run", lambda **_: what())
    assert tintc("env") == Finished(130, "", "error: interrupted\n")
    monkeypatch.undo()
    assert tintc("env").code == 0  # it is forgotten then


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "run", lambda **_: hidden())
    done = tintc("env", "--debug")
    assert done.code == 130
    assert "ImportError: initialization failed" in done.err
    assert done.err.endswith("error: interrupted\n")


def test_what_a_library_keeps_to_itself_ends_the_next_stage() -> None:
    interrupts.watch()
    with console.stages(2) as stage:
        stage("first")
        kept()
        with pytest.raises(KeyboardInterrupt):
            stage("second")
    with console.work() as show, pytest.raises(KeyboardInterrupt):
        show("more")


def test_a_library_that_does_not_unwind_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python, too: torch's stacks raise something else on the way out."""

    def export(*_: Any, **__: Any) -> NoReturn:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("Trying to pop empty mode stack")

    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(KeyboardInterrupt):
        package.compile(nano())


_IN_A_TEXT = """
import signal, sys
from tintc import __main__
from tintc.commands import env
def run(**_):
    exec("import signal; signal.raise_signal(signal.SIGINT)")
env.run = run
sys.argv = ["tintc", "env"]
__main__.run()
"""

_BEFORE_THE_COMMAND_LINE = """
import signal, sys
from tintc import __main__
class Interrupted:
    def find_spec(self, name, *_):
        if name == "tintc.cli":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
__main__.run()
"""

_AFTER_ALL_IS_SAID = """
import signal, sys
from tintc import __main__
sys.argv = ["tintc", "--version"]
try:
    __main__.run()
finally:
    signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize("code", [_IN_A_TEXT, _BEFORE_THE_COMMAND_LINE, _AFTER_ALL_IS_SAID])
def test_a_process_ends_by_its_code_and_not_by_the_signal(code: str) -> None:
    done = process(code=code)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_a_process_that_is_told_to_ignore_it_does() -> None:
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from tintc import interrupts
interrupts.watch_program()
signal.raise_signal(signal.SIGINT)
interrupts.finish_program()
signal.raise_signal(signal.SIGINT)
print("still here")
"""
    assert process(code=code).stdout == "still here\n"


@pytest.mark.slow  # starts of torch
@pytest.mark.parametrize("seconds", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_a_compilation_at_any_moment(seconds: float, tmp_path: Path) -> None:
    """Starting, importing, capturing, checking, writing, or done before."""
    root = Path(__file__).parents[2]
    running = subprocess.Popen(
        [sys.executable, "-m", "tintc", "compile", "tiny-opt", "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    time.sleep(seconds)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    if running.returncode == 0:
        assert err.startswith("wrote")
        return
    assert running.returncode == 130
    assert err.endswith("error: interrupted\n")
    assert [file.name for file in tmp_path.iterdir()] in ([], ["out"])
