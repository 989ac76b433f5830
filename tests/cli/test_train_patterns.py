"""`tintc compile --train` and what the commands say of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import tintc


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries are selected in vain: the default is value-only attention."""
    path = tmp_path_factory.mktemp("train") / "sim"
    config = path.with_suffix(".json")
    config.write_text(json.dumps({"lr_scale": {"*.fc1.bias": 0.5}}))
    patterns = ("--train", "*.fc1.*", "--train", "*.q_proj.weight", "--config", config)
    done = tintc("compile", "tiny-opt", "-o", path, *patterns, columns=200)
    assert done.code == 0, done.err
    assert "on what matches *.fc1.*, *.q_proj.weight" in done.out
    assert "8 weights, " in done.out and "% of all" in done.out
    assert "no gradient reaches" in done.out
    assert ".layers.*.self_attn.q_proj.weight (x4)" in done.out
    return path


def test_the_report(compiled: Path) -> None:
    facts = tintc("inspect", compiled, "--json").document
    trained = facts["trained"]
    assert trained["weights"] == facts["updated_slots"] == 8
    assert trained["parameters"] == facts["updated_parameters"]
    assert trained["share"] == trained["parameters"] / facts["auxiliary_parameters"]
    assert len(trained["unreached"]) == 4
    assert "no gradient reaches" in tintc("inspect", compiled, columns=200).out


@pytest.mark.slow
def test_slots_say_who_learns(compiled: Path) -> None:
    rows = tintc("inspect", compiled, "--slots", columns=200).out.split("memory slot")[0]
    said = {
        word: [row for row in rows.splitlines() if f" {word} " in row]
        for word in ("yes", "no gradient", "at 0.5 of the rate")
    }
    assert {word: len(found) for word, found in said.items()} == dict.fromkeys(said, 4)
    assert all("fc1.weight" in row for row in said["yes"])
    assert all("q_proj.weight" in row for row in said["no gradient"])


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    done = tintc("compile", "tiny-opt", "-o", tmp_path / "sim", "--train", "*.fc3.weight")
    assert "which matches no parameter" in done.refused(2)
    assert ".layers.*.fc1.weight" in done.err or ".layers.*.fc2.weight" in done.err


def test_the_transformer_back_end_trains_no_embedding(tmp_path: Path) -> None:
    done = tintc(
        "compile", "tiny-opt", "-o", tmp_path / "sim", "--train", "*embed_positions*",
        "--backend", "transformer",
    )  # fmt: skip
    assert "embed_positions.weight is an embedding that learns" in done.refused(3)
