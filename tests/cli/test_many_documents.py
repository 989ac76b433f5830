"""`tintc run` over a directory or JSON lines: a line each, and those of each document alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.artifacts import POSITIONS, TEXT, artifact
from tests.support.command import Finished, Terminal, as_terminal, tintc
from tintc.commands import console
from tintc.runtime.outputs import SimulatorLosses
from tintc.runtime.simulator import Simulator

TEXTS = ("The sea and the hills.", TEXT, f"The caf\u00e9. {TEXT}", "The river runs.", TEXT[:60])
EXACT = ("--dtype", "float64")


def ran(*arguments: object, code: int = 0) -> Finished:
    done = tintc("run", artifact(), *arguments)
    assert done.code == code, done.err
    return done


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_each_document_is_as_it_is_alone(batch: int, docs: Path) -> None:
    more = (*EXACT, "--train-fraction", 0.4, "--inner-lr", 0.02, "--json")
    found = ran("--file", docs, "--batch", batch, *more).document
    assert [row["name"] for row in found["documents"]] == [
        f"docs.jsonl, line {number}" for number in range(1, 6)
    ]
    for row, text in zip(found["documents"], TEXTS, strict=True):
        alone = ran("--text", text, *more).document
        for name, value in alone.items():
            if name in row:
                assert row[name] == pytest.approx(value, rel=1e-9), name
    rows, total = found["documents"], found["total"]
    assert (total["documents"], total["failed"]) == (5, 0)
    for when in ("before", "after"):
        nll = sum(row[f"loss_{when}"] * row["predicted_tokens"] for row in rows)
        mean = nll / sum(row["predicted_tokens"] for row in rows)
        assert total[f"loss_{when}"] == pytest.approx(mean)
        assert total[f"perplexity_{when}"] == pytest.approx(math.exp(mean))


def test_documents_of_like_lengths_share_a_call(
    docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, shapes = Simulator.losses, []

    def losses(simulator: Simulator, *inputs: Any, **more: Any) -> SimulatorLosses:
        shapes.append(tuple(inputs[0].shape))
        return own(simulator, *inputs, **more)

    monkeypatch.setattr(Simulator, "losses", losses)
    rows = ran("--file", docs, "--batch", 2, "--json").document["documents"]
    lengths = sorted((row["tokens"] for row in rows), reverse=True)
    assert shapes == [(2, lengths[0]), (2, lengths[2]), (1, lengths[4])]


@pytest.mark.slow
def test_a_directory_and_what_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, text in enumerate(TEXTS[:2]):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "2.txt").write_text("{}\n")
    (tmp_path / "3.txt").write_bytes(b"caf\xe9")
    (tmp_path / "4.txt").write_text(" ".join([TEXT] * 20))
    (tmp_path / "5.txt").write_text("a")
    done = ran("--file", tmp_path, "--generate", 2, "--train-fraction", 1, "-v", code=2)
    for words in (
        "2.txt: ",
        "3.txt: cannot read",
        "it is not UTF-8 text",
        f"4.txt: the text has more than {POSITIONS} tokens",
        "\ntotal ",
        "\n1.txt: ",
    ):
        assert words in done.out, words
    assert {"reading 0.txt", "3 documents of up to 30 tokens"} <= set(caplog.messages)
    assert "documents failed; the first is 2.txt" in done.err
    found = ran("--file", tmp_path, "--generate", 2, "--json", code=2).document
    first = ran("--text", TEXTS[0], "--generate", 2, "--json").document
    assert found["documents"][0]["generated"] == first["generated"]


def test_on_a_terminal_there_is_one_bar(docs: Path) -> None:
    with mock.patch.object(sys, "stderr", Terminal()), as_terminal():
        assert console.err.is_terminal
        done = tintc("run", artifact(), "--file", docs, "--generate", 2, terminal=True)
    assert done.code == 0, done.err
    assert "total" in done.out


def test_a_rate_that_diverges(docs: Path) -> None:
    done = ran("--file", docs, "--inner-lr", 1e38, code=5)
    assert "documents failed; the first is docs.jsonl, line 1: the loss after" in done.err
    assert "pass a smaller --inner-lr" in done.err
