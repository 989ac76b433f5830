"""Temporary directories beside a target, and what killed processes left of theirs.

A directory is locked while the process that made it lives. The kernel lets go of the lock whatever
ends the process, so no process that has its number now can be taken for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_MARK = "tintc-"  # nobody else names a directory so
_UNLOCKED = "tintc-new-"  # until it is locked, or where a file system knows no locks
_A_DAY_S = 24 * 3600.0
_KEPT = "artifact"  # what the target was, while another is moved to its place


@contextlib.contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """A new directory beside the target, in the same file system. On leaving it is removed, unless
    it was moved away.
    """
    made, lock = _make(target)
    try:
        yield made
    finally:
        _remove(made, target)
        os.close(lock)


@contextlib.contextmanager
def set_aside(target: Path) -> Iterator[None]:
    """Moves the target away while another takes its place; back if nothing did."""
    with temporary(target) as folder:
        kept = folder / _KEPT
        try:
            target.rename(kept)
            yield
        finally:
            _put_back(folder, target)


def clear(target: Path) -> None:
    """Removes what killed processes left beside the target. A target that was set aside, and that
    nothing replaced, comes back. What other processes have there now stays.
    """
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in list(entries):
            if entry.name.startswith(f".{target.name}.{_MARK}"):
                with contextlib.suppress(OSError):
                    _clear(Path(entry.path), target)


def _make(target: Path) -> tuple[Path, int]:
    """(directory, descriptor that holds its lock)."""
    prefix = f".{target.name}.{_UNLOCKED}"
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    lock = os.open(made, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named = made.with_name(f".{target.name}.{_MARK}{made.name.removeprefix(prefix)}")
        made = made.rename(named)
    return made, lock


def _clear(folder: Path, target: Path) -> None:
    """Raises OSError for a directory whose process lives."""
    unlocked = folder.name.startswith(f".{target.name}.{_UNLOCKED}")
    if unlocked and time.time() - folder.stat().st_mtime < _A_DAY_S:
        return
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _put_back(folder, target)
        _remove(folder, target)
    finally:
        os.close(lock)


def _put_back(folder: Path, target: Path) -> None:
    if (folder / _KEPT).exists() and not target.exists():
        (folder / _KEPT).rename(target)


def _remove(folder: Path, target: Path) -> None:
    """What could not be put back stays, for the next run."""
    if target.exists() or not (folder / _KEPT).exists():
        shutil.rmtree(folder, ignore_errors=True)
