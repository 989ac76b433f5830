"""`tintc statistics`, and its file with every command that compiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.artifacts import TEXT, source_directory
from tests.support.command import tintc
from tintc.compiler.gradient_statistics import read_statistics

SIZES = ("--chunk", 8, "--context", 6)
RMS = ("--preset", "exact", "--optimizer", "rms", "--eps", 0.1, "--inner-lr", 0.001)
FEW = ("--tokens", 12, "--limit", 1, "--seeds", 1, "--train-fraction", 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, statistics of exact gradients over it, and a simulator that divides by them."""
    path = tmp_path_factory.mktemp("rms")
    (path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    facts = gathered(path, "rms", "--preset", "exact").document
    assert facts["chunks"] == (facts["data"]["tokens"] - 1) // 8
    done = tintc(
        "compile", source_directory(), "-o", path / "sim", *RMS, "--statistics", path / "rms"
    )
    assert done.code == 0, done.err
    return path


def gathered(path: Path, name: str, *more: object) -> Any:
    data = ("--data", path / "text.txt", *SIZES)
    return tintc("statistics", source_directory(), *data, "-o", path / name, *more, "--json")


def test_what_is_said_and_written(folder: Path, tmp_path: Path) -> None:
    done = tintc(
        "statistics", source_directory(), "--data", folder / "text.txt", *SIZES, "--tokens", 30,
        "--preset", "exact", "--batch", 2, "-o", tmp_path / "rms", columns=200,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "of 3 chunks of 8 targets, with up to 6 tokens before them" in done.out
    assert "text.txt, 30 tokens" in done.out
    assert f"wrote {tmp_path / 'rms'}" in done.err
    found = read_statistics(tmp_path / "rms")
    assert (found.about.chunk, found.about.context, found.about.chunks) == (8, 6, 3)
    assert found.about.gradients.attention_gradient == "full"
    before = (tmp_path / "rms").read_bytes()
    again = ("--data", folder / "text.txt", *SIZES, "-o", tmp_path / "rms")
    assert "pass --force to replace it" in tintc("statistics", source_directory(), *again).refused(
        2
    )
    assert (tmp_path / "rms").read_bytes() == before
    assert tintc("statistics", source_directory(), *again, "--force").code == 0
    assert (tmp_path / "rms").read_bytes() != before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--chunk", 0), "expected at least 1"),
        (("--context", -1), "expected at least 0"),
        (("--context", 60), "make windows of 68 tokens; this model takes 64"),
        (("--tokens", 8), "the text has 8 tokens; expected at least 9"),
        (("--data", "nowhere.txt"), "there is no file nowhere.txt"),
        (("-o", "."), ". is a directory"),
        (("--train", "*.fc9.*"), "matches no parameter"),
    ],
)
def test_bad_options(folder: Path, tmp_path: Path, more: tuple[Any, ...], message: str) -> None:
    values: dict[str, Any] = {
        "--data": folder / "text.txt", "--chunk": 8, "--context": 6, "-o": tmp_path / "rms",
    }  # fmt: skip
    values[more[0]] = more[1]
    flat = [each for pair in values.items() for each in pair]
    assert message in tintc("statistics", source_directory(), *flat).refused(2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_compiled_simulator_runs_and_brings_its_own(folder: Path) -> None:
    sim = folder / "sim"
    assert tintc("run", sim, "--text", TEXT).code == 0
    assert tintc("verify", sim).code == 0
    assert tintc("verify", sim, "--steps", 2).code == 0  # is compiled anew
    assert "tintc.rms" not in tintc("inspect", sim, "--params").out
    assert "/statistics" in tintc("inspect", sim, "--slots", columns=200).out
    manifest = json.loads((sim / "manifest.json").read_text())
    assert manifest["statistics"]["chunk"] == 8


@pytest.mark.slow
def test_commands_that_compile_take_the_file(folder: Path) -> None:
    source, file = source_directory(), ("--statistics", folder / "rms")
    assert tintc("verify", source, *RMS, *file).code == 0
    bench = tintc("bench", source, *RMS, *file, "--tokens", 12, "--pairs", 1, "--no-memory")
    assert bench.code == 0, bench.err
    assert tintc("cost", source, *RMS).code == 0  # shapes need no numbers
    paged = tintc("cost", source, *RMS, "--backend", "transformer")
    assert paged.code in (0, 3), paged.err  # or it has no module for a part of the rule


@pytest.mark.slow
def test_experiments_divide_everybody_alike(folder: Path) -> None:
    text = ("--data", folder / "text.txt")
    file = ("--statistics", folder / "rms")
    done = tintc("eval", "lm", source_directory(), *text, *RMS, *file, *FEW, "--json")
    assert done.code == 0, done.err
    rows = {row["learner"]: row for row in done.document["rows"]}
    simulator, dynamic = (rows[name] for name in ("simulator", "dynamic evaluation"))
    assert simulator["perplexity"] == pytest.approx(dynamic["perplexity"], rel=1e-5)
    ablated = tintc(
        "ablate", source_directory(), *text, *RMS[2:], *file, "--tokens", 12, "--limit", 1,
        "--only", "exact,paper", "--json",
    )  # fmt: skip
    assert ablated.code == 0, ablated.err


REFUSED = {
    "compile": ("compile", "-o", "x"),
    "verify": ("verify",),
    "bench": ("bench", "--no-memory"),
    "eval lm": ("eval", "lm"),
    "eval classify": ("eval", "classify"),
    "ablate": ("ablate",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded: the source is not there."""
    monkeypatch.chdir(tmp_path)
    command, *more = REFUSED[name]
    words = (command, more.pop(0)) if command == "eval" else (command,)
    data = ("--data", folder / "text.txt") if name in ("eval lm", "ablate") else ()
    call = (*words, "./nowhere", *more, *data)
    missing = tintc(*call, "--optimizer", "rms").refused(2)
    assert "expected --statistics FILE" in missing
    unused = tintc(*call, "--statistics", folder / "rms").refused(2)
    assert "the optimizer is sgd; expected rms" in unused
    rms = (*call, "--optimizer", "rms", "--statistics")
    assert "does not exist; expected statistics" in tintc(*rms, folder / "none").refused(2)
    if name != "ablate":  # whose variants set this
        other = tintc(*rms, folder / "rms", "--attention-gradient", "value")
        assert "rms: gathered with" in other.refused(2)
    (tmp_path / "damaged").write_bytes((folder / "rms").read_bytes()[:5000])
    assert "cannot be read as statistics" in tintc(*rms, "damaged").refused(1)
