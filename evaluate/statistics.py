"""Means with their standard errors, and the paired test of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
