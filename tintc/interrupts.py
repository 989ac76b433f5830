"""Ctrl-C at any moment: the line "interrupted" and exit code 130, whatever was going on.

Raised in a library, KeyboardInterrupt may come out as something else (an extension module that
fails to initialize, a stack of torch that does not unwind), or not at all. So it is noted when it
comes, and whoever ends the program asks here.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import NoReturn

EXIT_CODE = 130
MESSAGE = "interrupted"


class _Noted:
    """came: whether Ctrl-C was pressed, and not yet reported."""

    came = False


def came() -> bool:
    return _Noted.came


def check() -> None:
    """Raises KeyboardInterrupt once more where a library kept it to itself."""
    if _Noted.came:
        raise KeyboardInterrupt


def forget() -> None:
    """It was reported."""
    _Noted.came = False


def watch() -> None:
    """From here on Ctrl-C is noted, and raises KeyboardInterrupt as ever. Where a parent process
    has it ignored it stays so.
    """
    handlers = (signal.default_int_handler, _note)
    if threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) in handlers
    ):
        signal.signal(signal.SIGINT, _note)


def watch_program() -> None:
    """The same for a whole process, from its first import to its end."""
    watch()
    sys.excepthook = _on_uncaught
    sys.unraisablehook = _on_unraisable
    # The first function that is registered is the last that runs: then all is done and said.
    atexit.register(_ignore)


def finish_program() -> None:
    """When there is nothing left to clean up, Ctrl-C ends the process at once."""
    if signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, _leave)


def _note(number: int, frame: FrameType | None) -> None:
    _Noted.came = True
    raise KeyboardInterrupt


def end() -> NoReturn:
    """Ends an interrupted process. Python itself would do so by the signal, and not by the code,
    where an interrupt once passed through `exec` of a text.
    """
    finish_program()
    atexit._run_exitfuncs()
    _exit()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"error: {MESSAGE}\n".encode())
    _exit()


def _exit() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(EXIT_CODE)


def _ignore() -> None:
    if signal.getsignal(signal.SIGINT) in (_note, _leave):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _on_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """While modules are imported, or between two statements of the program's end."""
    if not (_Noted.came or issubclass(kind, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, traceback)
        return
    os.write(2, f"error: {MESSAGE}\n".encode())
    end()


def _on_unraisable(found: sys.UnraisableHookArgs) -> None:
    """In a finalizer or a callback, where nobody could catch it: `came` says it later."""
    if not isinstance(found.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(found)
