"""Standard streams that are closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CLOSED = "cannot write to standard output: it is closed"


def occupy() -> None:
    """Opens what is closed of the first three descriptors on nothing: the next file would get its
    number, and what is printed would end there. Python has None for such a stream.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as we run)


class OutputLost(Exception):
    """Standard output takes nothing more; its cause says why. No other file is meant."""


@contextmanager
def writing() -> Iterator[None]:
    """Around whatever writes to standard output. Raises OutputLost."""
    try:
        yield
    except OSError as error:
        raise OutputLost from error


def abandon() -> None:
    """What standard output did not take goes nowhere, so that Python does not try once more, and
    complain, when it ends.
    """
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
