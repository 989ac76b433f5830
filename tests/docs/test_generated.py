"""Pages that are made from the code hold every item, and each is named by a page."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.command import tintc
from tintc.ir import errors
from tintc.ir.config import SimulatorConfig
from tintc.ir.contracts import PROPERTIES
from tintc.ir.ops import OPERATORS
from tintc.passes.lowering import DEFAULT_PIPELINE
from tintc.passes.specializing import DECODE, OPTIMIZATIONS, STREAM

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generated"] = module
    spec.loader.exec_module(module)
    return module


generated: Any = _load()


def page(name: str) -> str:
    text: str = generated.expand((REFERENCE / f"{name}.md").read_text(encoding="utf-8"))
    assert "<!-- generated" not in text
    return text


def test_dialect() -> None:
    text = page("dialect")
    for operator in OPERATORS.values():
        assert f"`tint.{operator.name}`" in text
        assert operator.schema in text
        assert " ".join(operator.meaning.split()) in text


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """The site carries a page that runs; building it again replaces it."""
    generated.write_demo(tmp_path / "demo")
    site = json.loads((tmp_path / "demo" / "data" / "site.json").read_text(encoding="utf-8"))
    assert site["title"] == "tiny-opt" and site["views"]["run"]["available"]
    assert (tmp_path / "demo" / "index.html").is_file()
    link = (ROOT / "docs" / "guides" / "page.md").read_text(encoding="utf-8")
    assert 'href="../demo/index.html"' in link


def test_passes() -> None:
    text = page("passes")
    for step in (*DEFAULT_PIPELINE, *STREAM, *DECODE, *OPTIMIZATIONS):
        assert f"### {step.name}\n" in text
        assert (sys.modules[step.run.__module__].__doc__ or "?").strip() in text
        assert all(name in text for name in (*step.requires, *step.ensures))
    assert all(f"`{name}`" in text for name in PROPERTIES)


def test_config() -> None:
    text = page("config")
    for name in SimulatorConfig().to_dict():
        assert f"| `{name}` | `--{name.replace('_', '-')}` |" in text


def test_exit_codes() -> None:
    text = page("exit-codes")
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.TintcError):
            assert re.search(rf"^\| {error.exit_code} \|.*`tintc\.{name}`", text, re.M)


def _tintc(arguments: str, _: Path) -> str:
    """As the page calls a command, but in this process."""
    done = tintc(*arguments.split(), columns=100)
    assert done.code == 0, done.err
    return done.out


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "_tintc", _tintc)
    text = page("commands")
    found = generated.commands()
    assert {"compile", "inspect", "run", "eval lm", "ablate", "env"} <= set(found)
    for name in found:
        assert f"## tintc {name}\n" in text
        assert f"`tintc {name}" in text.split("## tintc\n")[0], f"no line says what {name} does"


@pytest.mark.slow
def test_json_outputs() -> None:
    text = page("json")
    for command in (
        "compile",
        "inspect",
        "cost",
        "run",
        "verify",
        "export",
        "bench",
        "env",
        "statistics",
    ):
        assert f"## `tintc {command}" in text
    assert "| `perplexity_after` | float |" in text
    assert "| `estimate.flops` | int |" in text


def test_every_command_with_json_is_shown() -> None:
    shown = " ".join(generated.EXAMPLES)
    experiments = {json.loads(path.read_text())["command"] for path in _reports()}
    for name in generated.commands():
        assert name in shown or any(f"tintc {name}" in command for command in experiments), name


def _reports() -> list[Path]:
    return sorted((ROOT / "docs" / "results").glob("*.json"))


def test_coverage() -> None:
    """Every type in one row; what was not compared as it is has empty cells."""
    lines = json.loads((generated.MEASURED / "coverage.json").read_text(encoding="utf-8"))["types"]
    page = generated.coverage()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    assert set(rows) == {line["type"] for line in lines}
    whole = {line["type"] for line in lines if "paper" in line}
    compared = {kind for kind, row in rows.items() if "|  |  |" not in row and row.count("|") == 6}
    assert compared == whole
    assert f"{len(whole)} were also compared as they are" in page


def test_all_parts_are_used() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    named = set(re.findall(r"<!-- generated: ([a-z_]+)", pages))
    assert named == set(generated.PARTS)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(KeyError):
        generated.expand("<!-- generated: nothing -->")


def test_walk_names_keys_types_and_examples() -> None:
    found = list(generated._walk({"a": {"b": 1}, "c": [{"d": None}], "e": []}, ""))
    assert found == [
        ("a.b", "int", "`1`"),
        ("c[].d", "null", "`null`"),
        ("e", "list", "`[]`"),
    ]
