"""The sweep that finds overlapping boxes, against a comparison of every pair."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from tintc.ir.layout import Range, first_overlap

ranges = st.tuples(st.integers(0, 12), st.integers(0, 5)).map(lambda p: Range(p[0], p[0] + p[1]))


@given(st.lists(st.tuples(ranges, ranges), max_size=12))
def test_finds_a_pair_where_there_is_one(boxes: list[tuple[Range, Range]]) -> None:
    pairs = {
        (i, j)
        for (i, a), (j, b) in combinations(enumerate(boxes), 2)
        if a[0].overlaps(b[0]) and a[1].overlaps(b[1]) and all(r.size for r in (*a, *b))
    }
    found = first_overlap((i, *box) for i, box in enumerate(boxes))
    assert (found is None) == (not pairs)
    assert found is None or tuple(sorted(found)) in pairs


def test_many_boxes_take_no_time() -> None:
    """Comparing 40,000 with each other would take minutes."""
    side_by_side = [(i, Range(0, 9), Range(3 * i, 3 * i + 3)) for i in range(40_000)]
    assert first_overlap(side_by_side) is None
    assert first_overlap([*side_by_side, (-1, Range(8, 9), Range(7, 8))]) == (2, -1)
