"""Means with their standard errors, the paired test of a difference, and bootstrap intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

_RESAMPLES = 9999


@dataclass(frozen=True)
class Mean:
    """value: the mean of n numbers. error: its standard error, s / sqrt(n) with s the sample
    standard deviation; NaN for n = 1 or values that are not finite."""

    value: float
    error: float
    n: int


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values to take the mean of")
    numbers = np.asarray(values, dtype=np.float64)
    known = len(numbers) > 1 and bool(np.isfinite(numbers).all())
    error = float(numbers.std(ddof=1) / math.sqrt(len(numbers))) if known else math.nan
    return Mean(float(numbers.mean()), error, len(numbers))


def paired_p_value(after: Sequence[float], before: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p-value of no difference between two measurements of the same items.

    A permutation test of the mean difference: the sign of each item's difference is flipped,
    exactly where there are at most 9999 ways, else 9999 times at random with a fixed seed
    (scipy.stats.permutation_test, "samples"). 1 where every difference is 0.
    """
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if not differences.any():
        return 1.0
    if len(differences) < 2 or not np.isfinite(differences).all():
        return math.nan
    found = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def bootstrap_interval(
    columns: Sequence[Sequence[float]], value: Callable[..., Any], *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a value of several items: of 9999 samples of the items with replacement, the
    2.5th and the 97.5th percentile (scipy.stats.bootstrap, paired).

    columns: numbers of each item. value: of arrays, one a column, along their last axis. NaN for
    one item, which says nothing of others, for numbers that are not finite, and where a sample has
    no value (0 of 0).
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len(arrays[0]) < 2 or not all(np.isfinite(array).all() for array in arrays):
        return math.nan, math.nan
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            arrays,
            lambda *samples, axis: value(*samples),
            paired=True,
            vectorized=True,
            n_resamples=_RESAMPLES,
            batch=1000,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = found.confidence_interval
    return float(low), float(high)
