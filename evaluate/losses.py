"""Mean losses of sequences: computed in batches and stored one by one, and what follows from them.

A stored result is {"loss": mean -log p or None where it is not finite, "seconds"}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from tintc.evaluate.statistics import mean
from tintc.evaluate.store import Store

# of a stored loss: more than float32 has, less than would show a different order of sums in float64
_DIGITS = 9


def measured(
    store: Store,
    units: Sequence[dict[str, Any]],
    batch: int,
    compute: Callable[[list[int]], Iterable[dict[str, Any]]],
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """The result of each unit, out of the store or computed, `batch` at a time, and stored.

    compute: results of the units with these indices, each stored as it comes. advance: called with
    how many more are there.
    """
    found = [store.get(unit) for unit in units]
    missing = [index for index, result in enumerate(found) if result is None]
    advance(len(units) - len(missing))
    for start in range(0, len(missing), batch):
        rows = missing[start : start + batch]
        for row, result in zip(rows, compute(rows), strict=True):
            found[row] = store.put(units[row], result)
            advance(1)
    return [result for result in found if result is not None]


def results(losses_BT: Tensor, targets: int, seconds: float) -> list[dict[str, Any]]:
    """What is stored of a batch of sequences with so many targets each, which took so many seconds
    together.
    """
    means = (losses_BT.double().sum(1) / targets).tolist()
    each = round(seconds / len(means), 4)
    return [
        {"loss": rounded(loss) if math.isfinite(loss) else None, "seconds": each} for loss in means
    ]


def rounded(loss: float) -> float:
    """As it is stored."""
    return float(f"{loss:.{_DIGITS}g}")


def values(found: Sequence[dict[str, Any]]) -> list[float]:
    """The mean loss of each result; infinite where there is none."""
    return [math.inf if result["loss"] is None else result["loss"] for result in found]


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def change(differences: Sequence[float]) -> dict[str, float]:
    """Of the perplexity, in per cent, from the differences of mean losses, and its standard error:
    that of the mean difference times the ratio of the perplexities, as d exp(x) = exp(x) dx."""
    found = mean(differences)
    ratio = perplexity(found.value)
    return {"change": 100 * (ratio - 1), "error": 100 * ratio * found.error}
