"""The rate is the best of its grid, every rate is asked for once, and what has no finite loss is
never chosen.
"""

import math

import pytest

from tintc.evaluate.choice import START, choose_given, choose_rate, choose_rule, rate
from tintc.ir.config import SimulatorConfig


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


def test_of_several_rules_the_best_at_its_own_rate() -> None:
    """The best rate of one is far from that of the other, and where the next search starts."""
    best = {0.0: (rate(2), 1.0), 0.9: (rate(-9), 0.5), 0.5: (rate(0), math.nan)}
    asked: list[tuple[float, float]] = []

    def loss(config: SimulatorConfig) -> float:
        asked.append((config.momentum, config.inner_lr))
        at, lowest = best[config.momentum]
        return lowest + abs(math.log(config.inner_lr / at))

    rules = [SimulatorConfig.exact(momentum=momentum) for momentum in best]
    starts: dict[SimulatorConfig, float] = {}
    found = choose_rule(rules, loss, starts)
    assert found == SimulatorConfig.exact(momentum=0.9, inner_lr=rate(-9))
    assert [starts[rule] for rule in rules[:2]] == [rate(2), rate(-9)]
    assert len(set(asked)) == len(asked)
    asked.clear()
    assert choose_rule(rules[1:2], loss, starts) == found
    assert asked == [(0.9, rate(k)) for k in (-10, -9, -8)]


def test_a_tie_goes_to_the_first_rule() -> None:
    rules = [SimulatorConfig.exact(decay=decay) for decay in (0.1, 0.0)]
    assert choose_rule(rules, lambda config: 1.0, {}).decay == 0.1


@pytest.mark.parametrize("target", [2e-5, 5e-5, 1e-4, 4e-4])
def test_among_given_rates_the_search_starts_in_the_middle_and_asks_no_more_than_it_needs(
    target: float,
) -> None:
    asked: list[float] = []

    def loss(value: float) -> float:
        asked.append(value)
        return abs(math.log(value / target))

    rates = (4e-4, 1e-4, 2e-5, 5e-5, 2e-4)
    assert choose_given(loss, rates) == target
    assert len(set(asked)) == len(asked) and set(asked[:3]) == {5e-5, 1e-4, 2e-4}
    assert (2e-5 in asked) is (target <= 5e-5)
    assert choose_given(lambda value: math.nan, rates) == 2e-5
    assert choose_given(loss, (0.5,)) == 0.5


def test_a_rule_is_chosen_among_given_rates() -> None:
    def loss(config: SimulatorConfig) -> float:
        return abs(config.inner_lr - 0.3) - config.decay

    rules = [SimulatorConfig(decay=decay) for decay in (0.0, 0.1)]
    found = choose_rule(rules, loss, {}, (0.1, 0.25, 0.5))
    assert (found.inner_lr, found.decay) == (0.25, 0.1)
