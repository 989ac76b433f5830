"""What became of the rows of a test, and why: counted, and said at the end of the run."""

from __future__ import annotations

import re

_RESULTS = ("compiled", "ran", "refused", "wrong", "crashed")

# By test, what became of a row, and why -> how often. `pytest` prints those of all its workers.
COUNTED: dict[str, dict[str, dict[str, int]]] = {}


def counted(test: str, result: str, why: str = "", times: int = 1) -> None:
    """Notes one row, or several of another process."""
    assert result in _RESULTS
    reasons = COUNTED.setdefault(test, {}).setdefault(result, {})
    reasons[why] = reasons.get(why, 0) + times


def add(other: dict[str, dict[str, dict[str, int]]]) -> None:
    """Adds what another process counted."""
    for test, results in other.items():
        for result, reasons in results.items():
            for why, times in reasons.items():
                counted(test, result, why, times)


def lines(test: str) -> list[str]:
    """`compiled 22, refused 8, wrong 0, crashed 0`, and how often a row was refused for what."""
    results = COUNTED[test]
    good = {"compiled", "ran"} & results.keys()
    wanted = [result for result in _RESULTS if result in good or result not in ("compiled", "ran")]
    totals = [f"{result} {sum(results.get(result, {}).values())}" for result in wanted]
    reasons: dict[str, int] = {}
    for why, times in results.get("refused", {}).items():
        if not why:
            continue
        short = without_places(why)
        reasons[short] = reasons.get(short, 0) + times
    most_first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return [", ".join(totals), *(f"{times:4}  {why}" for why, times in most_first)]


def without_places(refusal: str) -> str:
    """The operators that a refusal names, or else its sentence without names of modules."""
    operators = re.findall(r"(?:aten|wrap)[\w.]*(?= x\d)", refusal)
    if operators:
        return ", ".join(sorted(set(operators)))
    return re.sub(r"\S*blocks[._]\S*", "...", refusal)[:100]
