"""Grids of parameters: by default a sample that covers them, the full product in `slow`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def grid(*, together: int = 2, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over the product of the axes, named like the test's arguments.

    together: the rows that run by default hold every combination of values of this many axes; 1:
    every value. The other rows are marked `slow`.
    """
    values = [list(axis) for axis in axes.values()]
    chosen = covering([len(axis) for axis in values], together)
    rows = [
        _row([axis[i] for axis, i in zip(values, indices, strict=True)], indices in chosen)
        for indices in product(*(range(len(axis)) for axis in values))
    ]
    return pytest.mark.parametrize(tuple(axes), rows)


def some(names: str | tuple[str, ...], rows: Iterable[Any], default: Iterable[Any]) -> Any:
    """`pytest.mark.parametrize` over the rows, of which those that are not in `default` are
    `slow`.
    """
    rows, kept = list(rows), list(default)
    assert kept and all(row in rows for row in kept), f"{kept} is no part of {rows}"
    single = isinstance(names, str)
    return pytest.mark.parametrize(
        names, [_row([row] if single else row, row in kept) for row in rows]
    )


def covering(sizes: Sequence[int], together: int) -> set[tuple[int, ...]]:
    """Few rows of indices of a product of these sizes which hold every combination of `together`
    axes' values: each time the row that adds most; of equals one whose values were used least.
    """
    together = min(together, len(sizes))
    left = {row: _held(row, together) for row in product(*map(range, sizes))}
    missing = set().union(*left.values())
    chosen: set[tuple[int, ...]] = set()
    used: Counter[tuple[int, int]] = Counter()
    while missing:
        best = max(
            left,
            key=lambda row: (len(left[row] & missing), -sum(map(used.__getitem__, enumerate(row)))),
        )
        chosen.add(best)
        used.update(enumerate(best))
        missing -= left.pop(best)
    return chosen


def _held(row: tuple[int, ...], together: int) -> frozenset[tuple[tuple[int, int], ...]]:
    """The combinations of (axis, value) that a row holds."""
    return frozenset(combinations(enumerate(row), together))


def _row(values: Sequence[Any], by_default: bool) -> Any:
    marks = () if by_default else (pytest.mark.slow,)
    return pytest.param(*values, marks=marks, id="-".join(map(_said, values)))


def _said(value: Any) -> str:
    """A value in the name of a test."""
    if isinstance(value, (list, tuple)):
        return "-".join(map(_said, value))
    text = str(value).removeprefix("torch.")
    return "".join(c if c.isprintable() and c not in "[]" else " " for c in text)
