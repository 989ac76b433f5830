"""The rate is the best of its grid, every rate is asked for once, and what has no finite loss is
never chosen.
"""

import math

import pytest

from tintc.evaluate.choice import START, choose_rate, rate


@pytest.mark.parametrize("target", [rate(k) for k in (-17, -4, -1, 0, 1, 2, 3, 9)])
@pytest.mark.parametrize("coarse", [True, False])
def test_finds_the_minimum_of_a_valley(target: float, coarse: bool) -> None:
    asked: list[float] = []

    def loss(value: float) -> float:
        asked.append(value)
        return abs(math.log(value / target))

    assert choose_rate(loss, coarse=coarse) == target
    assert len(set(asked)) == len(asked)


def test_starts_where_it_is_told_and_stays_on_one_grid() -> None:
    asked: list[float] = []

    def loss(value: float) -> float:
        asked.append(value)
        return abs(math.log(value / 7.07e-5))

    assert choose_rate(loss, start=rate(-1) * 1.01, coarse=False) == rate(-1) == 7.07e-5
    assert asked[:3] == [rate(-2), rate(-1), rate(0)] and rate(0) == START


def test_divergence_is_no_choice() -> None:
    assert choose_rate(lambda value: 1 / value if value < 3e-5 else math.nan) == rate(-4) == 2.5e-5
    assert choose_rate(lambda value: math.inf if value > 1e-5 else value) < 1e-5


def test_a_tie_goes_to_the_smaller_rate() -> None:
    assert choose_rate(lambda value: max(0.0, math.log(value / START))) <= START


def test_the_search_ends_where_smaller_is_always_better() -> None:
    assert choose_rate(lambda value: value) == rate(-48)
