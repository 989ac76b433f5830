"""What docs/results holds is what the site shows, and the command stands beside it."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_generated import generated
from tintc.evaluate.tables import TABLES

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "docs" / "results").glob("*.json"))
PAGE = ROOT / "docs" / "reference" / "results.md"


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_result_is_shown_as_it_was_measured(path: Path) -> None:
    report = load(path)
    table = TABLES[report["experiment"]](report).markdown()
    shown = generated.expand(PAGE.read_text(encoding="utf-8"))
    assert table.strip() in shown
    assert f"`{report['command']}`" in shown
    picture = re.search(rf"!\[[^\]]*\]\((.*{path.stem}\.png)\)", shown)
    assert picture is not None and (PAGE.parent / picture[1]).is_file()
    assert str(Path.home()) not in path.read_text()
    assert '"/' not in path.read_text() and not any(
        Path(part).is_absolute() for part in shlex.split(report["command"])
    )


def test_rules_are_shown_as_they_were_measured() -> None:
    """One table of all reports: each rule and number of steps once, and its figures."""
    paths = sorted((ROOT / "docs" / "results").glob("*/*.json"))
    shown = generated.expand(PAGE.read_text(encoding="utf-8"))
    seen = set()
    for path in paths:
        before, dynamic, simulator = load(path)["rows"][:3]
        assert [row["learner"] for row in (before, dynamic, simulator)] == [
            "unmodified model", "dynamic evaluation", "simulator",
        ]  # fmt: skip
        seen.add((str(simulator["rule"]), simulator["config"]["steps"]))
        for row in (dynamic, simulator):
            assert f"| {row['perplexity']:.3f} | {row['change']:+.2f} ±" in shown
        assert '"/' not in path.read_text()
    assert len(seen) == len(paths) >= 3


def test_both_models_and_all_experiments_are_there() -> None:
    kinds = {(report["experiment"], report["model"]["name"]) for report in map(load, REPORTS)}
    wanted = {(kind, model) for kind in TABLES for model in ("tiny-opt", "smollm2-135m")}
    assert kinds >= wanted
