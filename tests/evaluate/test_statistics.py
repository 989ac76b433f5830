"""Means, errors and p-values against known distributions and exact counts."""

import math
import random
import statistics
from typing import Any

import pytest

from tintc.evaluate.statistics import bootstrap_interval, mean, paired_p_value


def test_mean_and_its_standard_error() -> None:
    found = mean([1.0, 2.0, 3.0, 6.0])
    assert found.value == 3.0 and found.n == 4
    assert found.error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2)
    assert math.isnan(mean([5.0]).error)
    with pytest.raises(ValueError, match="no values"):
        mean([])


def test_a_few_pairs_are_counted_exactly() -> None:
    # Of the 2^5 ways to flip signs, two have a mean as far from zero as five equal differences.
    assert paired_p_value([1, 2, 3, 4, 5], [0, 1, 2, 3, 4]) == pytest.approx(2 / 32)


def test_no_difference_at_all_and_what_cannot_be_tested() -> None:
    assert paired_p_value([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert math.isnan(paired_p_value([1.0], [2.0]))
    assert math.isnan(paired_p_value([1.0, math.inf], [2.0, 1.0]))


def test_the_same_numbers_twice_and_symmetric() -> None:
    source = random.Random(0)
    after, before = ([source.gauss(shift, 1) for _ in range(40)] for shift in (0.3, 0.0))
    assert paired_p_value(after, before) == paired_p_value(after, before)
    assert paired_p_value(after, before) == pytest.approx(paired_p_value(before, after), abs=0.02)


def test_an_effect_is_found_and_noise_is_not_more_often_than_it_says() -> None:
    source = random.Random(1)
    assert paired_p_value([source.gauss(1, 1) for _ in range(50)], [0.0] * 50) < 0.001
    noise = [
        paired_p_value([source.gauss(0, 1) for _ in range(20)], [0.0] * 20) for _ in range(100)
    ]
    assert 0 < sum(p < 0.1 for p in noise) < 25  # 10 are expected


def _mean_of(values: Any) -> Any:
    return values.mean(-1)


def test_a_bootstrap_interval_of_two_is_both_and_of_many_that_of_the_normal_distribution() -> None:
    # samples of 0 and 1 have the means 0, 1/2, 1/2 and 1
    assert bootstrap_interval([[0.0, 1.0]], _mean_of) == (0.0, 1.0)
    values = [random.Random(number).gauss(3, 2) for number in range(200)]
    error = statistics.pstdev(values) / math.sqrt(len(values))
    expected = [statistics.fmean(values) + sign * 1.96 * error for sign in (-1, 1)]
    assert bootstrap_interval([values], _mean_of) == pytest.approx(expected, abs=error / 10)


def test_items_are_drawn_whole_and_with_them_all_their_columns() -> None:
    found = bootstrap_interval(
        [[2.0, 6.0, 4.0], [1.0, 3.0, 2.0]], lambda a, b: a.sum(-1) / b.sum(-1)
    )
    assert found == (2.0, 2.0)


def test_what_has_no_bootstrap_interval() -> None:
    for values in ([1.0], [1.0, math.inf], [0.0, 0.0, 1.0]):
        low, high = bootstrap_interval([values], lambda x: x.mean(-1) / x.mean(-1))
        assert math.isnan(low) and math.isnan(high)
