"""`tintc eval` as a user meets it: tables, files, resumption, and one clear line for what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts import POSITIONS, source_directory
from tests.command import tintc

WORDS = ("river", "town", "hill", "sea", "road", "bridge", "field", "mill")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "walk.txt"
    path.write_text(" ".join(f"The {WORDS[i % 8]} lies behind the {WORDS[i * 3 % 7]}." for i in range(120)), encoding="utf-8")
    return path


def lm(text: Path, *more: object) -> Any:
    small = ("--length", 16, "--limit", 2, "--choosing", 2, "--train-fraction", "0.5", "--seeds", "1,2")
    return tintc("eval", "lm", source_directory(), "--data", text, *small, *more)


def test_a_table_for_people_and_one_document_for_machines(text: Path) -> None:
    shown = lm(text)
    assert shown.code == 0, shown
    for words in ("unmodified model", "dynamic evaluation", "gradient ascent", "shuffled tokens", "n = 4 sequences of 16 tokens", "seeds 1, 2"):
        assert words in shown.out
    assert "nothing was kept: -o DIR" in shown.err
    report = lm(text, "--json", "-q").document
    assert [row["learner"] for row in report["rows"]][:3] == ["unmodified model", "dynamic evaluation", "simulator"]
    assert report["command"].startswith("tintc eval lm ") and report["machine"]["torch"]


def test_results_are_kept_and_a_second_run_computes_nothing(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    first = lm(text, "-o", folder, "--json").document
    assert sorted(path.name for path in folder.iterdir()) == ["plot.png", "report.json", "report.md", "units.jsonl"]
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "report.json").read_text())["rows"] == first["rows"]
    written = (folder / "report.md").read_text()
    assert "| 0.5 | unmodified model |" in written and first["command"] in written
    again = lm(text, "-o", folder, "--batch", 2, "--json").document
    assert again["rows"] == first["rows"]
    assert again["units"]["computed"] == 0 and first["units"]["found"] == 0


def test_a_given_rate_is_not_chosen(text: Path) -> None:
    report = lm(text, "--inner-lr", "1e-3", "--presets", "paper,exact", "--json").document
    assert {row["inner_lr"] for row in report["rows"]} == {None, 1e-3, -1e-3}
    assert report["data"]["choosing_sequences"] == 0
    assert [row["norm_update"] for row in report["rows"] if row["learner"] == "dynamic evaluation"] == ["bias", "all"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--train-fraction", "1.5"), "train fraction is 1.5; expected a number between 0 and 1"),
        (("--train-fraction", "half"), "fractions are '0.5,half'; expected numbers with commas between them"),
        (("--seeds", "1,x"), "seeds are '1,2,1,x'; expected whole numbers"),
        (("--presets", "best"), "preset is 'best'"),
        (("--length", POSITIONS + 1), f"this model takes {POSITIONS} tokens"),
        (("--layers", 7), "layers is 7"),
        (("--steps", 0), "steps is 0"),
        (("--device", "tpu"), "device is 'tpu'"),
        (("--dtype", "int8"), "dtype is 'int8'"),
    ],
)
def test_bad_options(text: Path, more: tuple[object, ...], message: str) -> None:
    assert message in lm(text, *more).refused(2)


def test_bad_data(text: Path, tmp_path: Path) -> None:
    assert "there is no file" in lm(tmp_path / "none.txt").refused(2)
    short = tmp_path / "short.txt"
    short.write_text("One day.", encoding="utf-8")
    assert "expected at least one sequence of 16" in lm(short).refused(2)
    assert "the evaluated text itself" in lm(text, "--choose", text).refused(2)


def test_bad_outputs(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be a directory for results" in lm(text, "-o", tmp_path / "file").refused(2)
    assert (tmp_path / "file").read_text() == "mine"
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "units.jsonl").write_text("mine\n")
    assert "is no result of an earlier run" in lm(text, "-o", folder).refused(2)
    assert (folder / "units.jsonl").read_text() == "mine\n"


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = tintc("eval", "lm", source_directory(), "--data", "wikitext-2").refused(2)
    assert "could not be fetched from the hub (no route to host)" in message and "--data FILE" in message


def test_hub_splits(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """The test split is evaluated, and the validation split is what rates are chosen on."""
    import datasets

    asked = []

    def load(path: str, name: str, *, split: str, **_: Any) -> list[dict[str, str]]:
        asked.append((path, name, split))
        return [{"text": text.read_text() + split}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    small = ("--length", 16, "--limit", 1, "--choosing", 1, "--train-fraction", "0.5", "--seeds", "1", "--json")
    report = tintc("eval", "lm", source_directory(), "--data", "wikitext-2", *small).document
    assert [split for *_, split in asked] == ["test", "validation"]
    assert report["data"]["name"] == "wikitext-2 (test)" and report["data"]["chosen_on"] == "wikitext-2 (validation)"
