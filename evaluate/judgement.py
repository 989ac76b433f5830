"""From log-likelihoods of labels to what is right, how right, and how surely so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintc.evaluate.lessons import Scores
from tintc.evaluate.statistics import mean

Floats = NDArray[np.float64]


def label_likelihoods(scores: Scores, calibrated: bool) -> Floats:
    """(items, labels): log p(label | text), calibrated less log p(label | domain string),
    normalised over the labels of each item.

    Calibration is Holtzman et al. 2021: words compete for the probability that the domain gives
    them whatever the text is. An item with a number that is not finite has -inf for every label.
    """
    found: Floats = np.asarray(scores.given_text, dtype=np.float64)
    if calibrated:
        found = found - np.asarray(scores.given_domain, dtype=np.float64)
    broken = ~np.isfinite(found).all(axis=-1, keepdims=True)
    found = np.where(broken, 0.0, found)
    normalised: Floats = found - np.logaddexp.reduce(found, axis=-1, keepdims=True)
    return np.where(broken, -math.inf, normalised)


def correctness(scores: Scores, labels: Sequence[int], calibrated: bool) -> Floats:
    """(items): 1 where the likeliest label is the right one, else 0. Of equally likely labels the
    first counts; of -inf none.
    """
    found = label_likelihoods(scores, calibrated)
    right = (found.argmax(axis=-1) == np.asarray(labels)) & np.isfinite(found[:, 0])
    return np.asarray(right, dtype=np.float64)


def quality(scores: Scores, labels: Sequence[int], calibrated: bool) -> tuple[float, float]:
    """(accuracy, mean log-likelihood of the right label): what settings are chosen by, the second
    where the first ties.
    """
    found = label_likelihoods(scores, calibrated)
    return float(correctness(scores, labels, calibrated).mean()), float(
        found[np.arange(len(labels)), np.asarray(labels)].mean()
    )


def summary(right_SN: Floats) -> dict[str, Any]:
    """Accuracy of S seeds on N items: mean and standard error over seeds, each seed's, and the
    standard error over items.

    A standard error over one seed is None. Over items: of the items' mean correctness,
    sqrt(variance / N).
    """
    over_seeds, over_items = mean(right_SN.mean(1).tolist()), mean(right_SN.mean(0).tolist())
    error = None if math.isnan(over_seeds.error) else over_seeds.error
    return {
        "accuracy": over_seeds.value,
        "standard_error": error,
        "per_seed": right_SN.mean(1).tolist(),
        "item_standard_error": over_items.error,
        "n": right_SN.shape[1],
    }
