"""What is timed against each other computes the same, and one of the two by islands."""

from __future__ import annotations

import pytest

from tests.support.island_speed import LEFT, compare


@pytest.mark.slow
@pytest.mark.parametrize("left", LEFT)
def test_both_compute_the_same(left: str) -> None:
    share, times, differ = compare("nn.TransformerEncoder", left, rounds=1)
    assert 0 < share < 1 and min(times) > 0
    assert differ < 1e-4
