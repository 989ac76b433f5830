"""Types of transformers that islands carry, as `python -m tests.coverage_table` compares them, and
the lines of it that the docs keep.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.coverage_table import compared, earlier, line, report, types
from tests.support.grid import some

STORED = Path(__file__).parents[2] / "docs" / "measured" / "coverage.json"
LINES = {each["type"]: each for each in json.loads(STORED.read_text(encoding="utf-8"))["types"]}
EQUAL = [kind for kind, each in LINES.items() if each["became"] == "equal"]


@some("kind", EQUAL, default=["apertus"])
def test_equals_autograd(kind: str) -> None:
    found = compared(kind, quick=True)
    assert found["became"] == "equal", line(found)
    assert found["exact"]["islands"] == LINES[kind]["exact"]["islands"]


def test_no_line_is_wrong() -> None:
    assert list(LINES) == [kind for kind in types() if kind in LINES]
    assert not [kind for kind, each in LINES.items() if each["became"] in ("differs", "failed")]
    assert all(each.get("reason") for kind, each in LINES.items() if kind not in EQUAL)


def test_lines_of_types_named_again_are_replaced(tmp_path: Path) -> None:
    lines = [{"type": kind, "became": "refused"} for kind in ("llama", "bert")]
    path = tmp_path / "lines.json"
    path.write_text(json.dumps(report(lines, quick=True)))
    assert [each["type"] for each in earlier(path, ["bert"], rest=False)] == ["llama"]
    assert earlier(path, [], rest=False) == []
    assert len(earlier(path, [], rest=True)) == 2
