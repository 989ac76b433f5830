"""The sample of a grid holds what it promises; nothing of the grid is lost."""

from itertools import combinations, product
from pathlib import Path

import pytest

from tests.support.grid import covering, grid, some
from tests.support.sampled import EVERY


def is_slow(row: object) -> bool:
    return bool(getattr(row, "marks"))  # noqa: B009 (its type is private)


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(2, 2, 2, 10), (5, 4, 3), (7,), (2, 1, 4)], ids=str)
def test_covering(sizes: tuple[int, ...], together: int) -> None:
    rows, together = covering(sizes, together), min(together, len(sizes))
    for axes in combinations(range(len(sizes)), together):
        wanted = set(product(*(range(sizes[axis]) for axis in axes)))
        assert {tuple(row[axis] for axis in axes) for row in rows} == wanted
    largest = sorted(sizes)[-together:]
    least = 1
    for size in largest:
        least *= size
    assert least <= len(rows) < 2 * least


def test_a_grid_is_the_whole_product() -> None:
    _, rows = grid(a="xyz", b=[1, 2], c=[None, (3, 4)]).args
    assert [row.values for row in rows] == list(product("xyz", [1, 2], [None, (3, 4)]))
    assert [is_slow(row) for row in rows].count(False) == 6
    assert [row.id for row in rows[:2]] == ["x-1-None", "x-1-3-4"]


def test_one_value_at_a_time_uses_all_values_alike() -> None:
    _, rows = grid(together=1, a=range(6), b=["x", "y"]).args
    chosen = [row.values for row in rows if not is_slow(row)]
    assert [[value for _, value in chosen].count(value) for value in "xy"] == [3, 3]


def test_some() -> None:
    names, rows = some("name", ["a", "b", "c"], default=["b"]).args
    assert names == "name"
    assert [(row.values, is_slow(row)) for row in rows] == [
        (("a",), True),
        (("b",), False),
        (("c",), True),
    ]
    with pytest.raises(AssertionError, match="is no part of"):
        some("name", ["a"], default=["b"])


def test_sampled_tests_are_there() -> None:
    """A test that is renamed would run whole again, silently."""
    root = Path(__file__).parents[1]
    for test in EVERY:
        file, _, function = test.partition("::")
        assert f"def {function.rpartition('::')[-1]}(" in (root / file).read_text(
            encoding="utf-8"
        ), test
