"""Parts of the one line that a refusal is."""

from __future__ import annotations

from collections.abc import Collection

from tintc.ir.errors import SourceError, raise_if_interrupted


def first_line(error: BaseException) -> str:
    """The first line of an error's message (two where the first only announces the next), for a
    message of our own. Raises KeyboardInterrupt where the error came of one.
    """
    raise_if_interrupted(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:300]


def listed(names: Collection[str]) -> str:
    """A few of many names: `a, b, c and 4 more`."""
    shown = sorted(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def untrusted(name: str) -> SourceError:
    """The error for a model that brings code."""
    return SourceError(
        f"{name} brings Python code of its own, which would run on this machine; read it "
        "first, then pass trust_remote_code=True if you trust it"
    )
