"""Chooses an inner learning rate, and a rule, on data that is not evaluated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from tintc.ir.config import SimulatorConfig

START = 1e-4
_LIMIT = 48  # half-octaves either way: a factor of 1.7e7


def rate(half_octaves: int) -> float:
    """START * 2^(k/2), to three digits, so that it reads well and is the same everywhere."""
    return float(f"{START * 2 ** (half_octaves / 2):.3g}")


def choose_rate(
    loss: Callable[[float], float], *, start: float = START, coarse: bool = True
) -> float:
    """The rate of the lowest loss among START * 2^(k/2), by hill climbing from the one next to
    `start`: by factors of 2 (if coarse), then of sqrt 2.

    loss: mean loss at a rate; what is not finite counts as infinitely bad. Every rate is asked for
    once. A tie goes to the smaller rate.
    """
    seen: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in seen:
            value = loss(rate(k)) if abs(k) <= _LIMIT else math.inf
            seen[k] = value if math.isfinite(value) else math.inf
        return seen[k]

    best = max(-_LIMIT, min(_LIMIT, round(2 * math.log2(start / START))))
    for step in (2, 1) if coarse else (1,):
        best = _climb(at, best, step, -_LIMIT)
    return rate(best)


def choose_given(
    loss: Callable[[float], float], rates: Sequence[float], *, start: float = START
) -> float:
    """The same among given rates, from the one next to `start` to its neighbours and on."""
    given, seen = sorted(rates), {math.inf: math.inf}

    def at(k: int) -> float:
        value = given[k] if 0 <= k < len(given) else math.inf
        if value not in seen:
            found = loss(value)
            seen[value] = found if math.isfinite(found) else math.inf
        return seen[value]

    nearest = min(range(len(given)), key=lambda k: abs(math.log(given[k] / start)))
    return given[_climb(at, nearest, 1, 0)]


def _climb(at: Callable[[int], float], best: int, step: int, lowest: int) -> int:
    """Where no neighbour has a lower loss."""
    improved = True
    while improved:
        near = (best - step, best, best + step)
        found = min((k for k in near if k >= lowest), key=lambda k: (at(k), k))
        diverged = math.isinf(at(found)) and found > lowest  # all three: go on downwards
        improved, best = at(found) < at(best) or diverged, found
    return best


def choose_rule(
    rules: Sequence[SimulatorConfig],
    loss: Callable[[SimulatorConfig], float],
    starts: dict[SimulatorConfig, float],
    rates: Sequence[float] = (),
) -> SimulatorConfig:
    """Of several rules, each at its own best rate, the one of the lowest loss; a tie goes to the
    first.

    starts: where the search for a rule's rate starts, if it was chosen before; is brought up to
    date. rates: all that are tried; none for any.
    """
    seen: dict[SimulatorConfig, float] = {}
    best = []
    for rule in rules:

        def at(rate: float, rule: SimulatorConfig = rule) -> float:
            config = dataclasses.replace(rule, inner_lr=rate)
            seen[config] = loss(config)
            return seen[config]

        start = starts.get(rule, START)
        if rates:
            found = choose_given(at, rates, start=start)
        else:
            found = choose_rate(at, start=start, coarse=rule not in starts)
        starts[rule] = found
        best.append(dataclasses.replace(rule, inner_lr=found))

    def lowest(rule: SimulatorConfig) -> float:
        value = seen.get(rule, math.inf)  # the search may end where it asked nothing
        return value if math.isfinite(value) else math.inf

    return min(best, key=lowest)
