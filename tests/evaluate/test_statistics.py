"""Means, errors and p-values against known distributions and exact counts."""

import math
import random

import pytest

from tintc.evaluate.statistics import mean, paired_p_value


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
