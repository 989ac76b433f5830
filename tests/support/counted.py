"""What became of the rows of a test, and why: counted, and said at the end of the run."""

from __future__ import annotations

# By test, what became of a row, and why -> how often. `pytest` prints those of all its workers.
COUNTED: dict[str, dict[str, dict[str, int]]] = {}


def counted(test: str, result: str, why: str = "", times: int = 1) -> None:
    """Notes one row, or several of another process."""
    reasons = COUNTED.setdefault(test, {}).setdefault(result, {})
    reasons[why] = reasons.get(why, 0) + times
