"""Types of transformers that islands carry, as `python -m tests.coverage_table` compares them, and
the lines of it that the docs keep.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.coverage_table import _judged, compared, line, store, stored, types

STORED = Path(__file__).parents[2] / "docs" / "measured" / "coverage.json"
LINES = stored(STORED)
EQUAL = [kind for kind, each in LINES.items() if each["became"] == "equal"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", EQUAL)
def test_equals_autograd(kind: str) -> None:
    found = compared(kind, quick=True)
    assert found["became"] == "equal", line(found)
    assert found["exact"]["islands"] == LINES[kind]["exact"]["islands"]


def test_no_line_is_wrong() -> None:
    assert list(LINES) == [kind for kind in types() if kind in LINES]
    assert not [kind for kind, each in LINES.items() if each["became"] in ("differs", "failed")]
    assert all(each.get("reason") for kind, each in LINES.items() if kind not in EQUAL)


def test_limits_of_lines() -> None:
    """Without casts 1e-9; as it is 1e-6, or twice what the model's own casts round."""
    for each in (LINES[kind] for kind in EQUAL):
        exact, paper = each["exact"], each.get("paper", {"as_is": 0.0})
        assert exact["cast_free"] <= 1e-9
        limit = max(1e-6, 2 * exact.get("casts", 0.0))
        assert max(exact.get("as_is", 0.0), paper["as_is"]) <= limit, each
    assert sum("paper" in each for each in LINES.values()) >= 40


@pytest.mark.parametrize(
    ("exact", "became"),
    [
        ({"cast_free": 1e-10}, "equal"),
        ({"cast_free": 1e-8}, "differs"),
        ({"cast_free": math.nan}, "differs"),
        ({"cast_free": 1e-10, "as_is": 9e-7, "casts": 0.0}, "equal"),
        ({"cast_free": 1e-10, "as_is": 3e-6, "casts": 1e-6}, "differs"),
        ({"cast_free": 1e-10, "as_is": 3e-6, "casts": 2e-6}, "equal"),
    ],
)
def test_what_is_equal(exact: dict[str, float], became: str) -> None:
    assert _judged({"exact": exact})["became"] == became


def test_lines_are_put_into_the_file_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    assert stored(path) == {}
    for kind, became in (("llama", "failed"), ("bert", "refused"), ("llama", "refused")):
        store(path, {"type": kind, "became": became})
    assert {k: each["became"] for k, each in stored(path).items()} == {
        "bert": "refused", "llama": "refused",
    }  # fmt: skip
    store(path, {"type": "opt", "became": "refused"}, fresh=True)
    assert list(stored(path)) == ["opt"]
