"""The streaming experiment: what it chooses on, its resumption, what it refuses, and what it
leaves.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.support.artifacts import TEXT, source_directory
from tests.support.command import tintc
from tests.support.streams import (
    CHUNK,
    DOCUMENTS,
    OTHER,
    RATE,
    STORY,
    auxiliary,
    by_autograd,
    by_name,
    numbers,
    passages,
    run,
    settings,
    total,
)
from tintc.evaluate import reports, stream
from tintc.evaluate.language import ASCENT, DYNAMIC, SIMULATOR, UNMODIFIED, Run
from tintc.evaluate.store import Store
from tintc.evaluate.stream_documents import Passage, longest
from tintc.evaluate.tables import stream_table
from tintc.evaluate.text import Text
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, NumericalError, TintcError, UsageError


def test_rates_are_chosen_on_other_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    measure = stream.Experiment.measure

    def spy(self: Any, run: Any, items: list[Passage], label: str) -> Any:
        seen.append((label, [item.title for item in items]))
        return measure(self, run, items, label)

    monkeypatch.setattr(stream.Experiment, "measure", spy)
    rates = (0.001, 0.01, 1e3)
    chosen = settings(inner_lr=None, rates=rates, presets=("exact",), controls=False, limit=1)
    chosen = dataclasses.replace(chosen, choosing_tokens=11, decays=(0.0, 1.0))
    report = run(chosen, other=OTHER)
    for label, titles in seen:
        expected = OTHER.parts if "choosing" in label else (DOCUMENTS[2],)
        assert titles == [text[:60] for text in expected]
    assert report["data"]["chosen_on_sha256"] == OTHER.sha256
    assert [each["targets"] for each in report["data"]["choosing_documents"]] == [10, 6]
    row = by_name(report)[DYNAMIC]
    documents = [
        each.ids_N for each in longest(auxiliary().tokenizer, list(enumerate(OTHER.parts)), 2, 11)
    ]
    # a decay of 1 takes every step back
    losses = {r: total(by_autograd(SimulatorConfig.exact(inner_lr=r), documents)) for r in rates}
    assert row["inner_lr"] == min(rates, key=lambda r: losses[r]) and row["rule"] == {}
    unchosen = run(settings(inner_lr=None, rates=rates[:1], limit=None, controls=False))
    assert [d["number"] for d in unchosen["data"]["documents"]] == [1, 2, 3]
    assert [d["number"] for d in unchosen["data"]["choosing_documents"]] == [0]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("reset", ["document", "never"])
def test_a_killed_run_goes_on_and_computes_nothing_twice(tmp_path: Path, reset: str) -> None:
    chosen, expected = settings(presets=("exact",), reset=reset), Store(None, {})
    report, path = run(chosen, expected), tmp_path / "units.jsonl"

    def kill(_: str, done: int, __: int) -> None:
        if done >= 5:
            raise Killed

    with pytest.raises(Killed):
        run(chosen, Store(path, {}), progress=kill)
    kept, again = len(path.read_text().splitlines()), Store(path, {})
    assert numbers(run(chosen, again)) == numbers(report)
    assert kept == 5 and again.computed == expected.computed - kept
    more = Store(path, {})
    run(settings(presets=("exact",), reset=reset, limit=4), more)
    # without a reset all but the first depend on what was read before them
    assert more.found == (15 if reset == "document" else 5)


class TestOverflow:
    def test_names_document_and_chunk_and_keeps_what_is_there(self, tmp_path: Path) -> None:
        chosen, path = settings(inner_lr=1e200, presets=("exact",)), tmp_path / "units.jsonl"
        message = "The river rises .* are not finite in chunk 1: .* lower inner_lr"
        for _ in range(2):
            store = Store(path, {})
            with pytest.raises(NumericalError, match=message):
                run(chosen, store)
        assert store.computed == 0 and len(path.read_text().splitlines()) == 3 + 1

    def test_of_a_control_is_a_row_that_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only one document of a batch: the others are read without it."""
        controls = stream.controls_of
        monkeypatch.setattr(
            stream,
            "controls_of",
            lambda label, found: [(n, each.at(-1e200)) for n, each in controls(label, found)[:1]],
        )
        report = run(settings(presets=("exact",), batch=2))
        row = by_name(report)[f"{SIMULATOR} (exact), gradient ascent"]
        assert row["perplexity"] == math.inf and math.isnan(row["change_interval"][0])
        assert row["overflow"] == {"document": 0, "chunk": 1} and row["learner"] == ASCENT
        assert row["curve"][0]["documents"] == 3
        assert "not finite in document 0, chunk 1" in stream_table(report).markdown()

    def test_one_row_of_several_does_not_spoil_the_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The weights of the second document are spoiled in its second chunk."""
        step = stream.Stream.step
        three, spoiled = passages(), passages()[1].ids_N

        def spoil(self: Any, ids: Tensor, mask: Tensor, new: Tensor) -> Any:
            for b in range(len(ids)):
                if torch.equal(ids[b, :3], spoiled[CHUNK + 1 :][:3]):
                    for value in self.groups[0].carried.given.values():
                        value[b] = math.nan
            return step(self, ids, mask, new)

        plain = run(settings(presets=("exact",), controls=False))
        monkeypatch.setattr(stream.Stream, "step", spoil)
        experiment = stream.Experiment(
            auxiliary(), settings(batch=3), Store(None, {}), lambda *_: None
        )
        ran = Run(SIMULATOR, SimulatorConfig.exact(inner_lr=RATE))
        found = experiment.measure(ran, three, "")
        assert found[1]["overflow"] == 1 and len(found[1]["losses"]) == 1
        whole = [math.fsum(result["losses"]) for result in found]
        rest = total(by_autograd(SimulatorConfig.exact(inner_lr=RATE), [spoiled]))
        assert whole[0] + whole[2] == pytest.approx(plain["rows"][1]["nll"] - rest, rel=1e-8)


def test_a_document_without_a_target() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source_directory())
    for text, found in (("", 1), ("\n", 2)):
        if found == 1:
            with pytest.raises(InputError, match=r"document 4 \(''\) has 1 tokens; expected at"):
                longest(tokenizer, [(0, TEXT), (4, text)], None, None)
        else:
            assert longest(tokenizer, [(4, text)], None, None)[0].targets == 1
    with pytest.raises(InputError, match="has 1 tokens"):
        run(text=Text("empty", " ", ("", "")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 0}, "chunk is 0; expected a whole number, at least 1"),
        ({"context": -1}, "context is -1; expected a whole number, at least 0"),
        ({"chunk": 60}, "make windows of 67 tokens; this model takes 64"),
        ({"keys": "none"}, "keys is 'none'; expected recompute or cache"),
        ({"reset": "none"}, "reset is 'none'; expected document or never"),
        ({"tokens": 1}, "tokens is 1; expected at least 2"),
        ({"choosing_tokens": 1}, "choosing_tokens is 1; expected at least 2"),
        ({"buckets": 0}, "buckets is 0; expected at least 1"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"rates": (0.1,)}, "rates are to be chosen from; expected one of them"),
        ({"rates": (0.0, 0.1), "inner_lr": None}, "expected numbers above 0"),
        ({"rates": (0.1, 0.1), "inner_lr": None}, "none of them twice"),
        ({"variants": ("sgd",)}, "optimizers other than the config's own, sgd, none of them"),
        ({"variants": ("adam", "adam")}, "none of them twice"),
        ({"variants": ("best",)}, "optimizer is 'best'"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(settings(**changes), other=OTHER)


def test_what_rates_are_chosen_on_is_other_text() -> None:
    chosen = settings(inner_lr=None)
    with pytest.raises(InputError, match="the evaluated text itself"):
        run(chosen, other=STORY)
    with pytest.raises(TintcError, match="has one document, and learning rates are chosen on othe"):
        run(chosen, text=Text("one", TEXT))


def test_a_report_is_a_table_and_a_picture(tmp_path: Path) -> None:
    report = run(settings(variants=("adam",)))
    report |= reports.about("tintc eval lm", 1.0, "cpu")
    reports.write(tmp_path, report)
    shown = (tmp_path / "report.md").read_text()
    assert "chunks of 5 with 7 tokens before them, keys recompute, reset document" in shown
    assert "| simulator (exact), shuffled tokens | 0.02 |" in shown
    assert "The longest documents, by their numbers from 0: 0, 2, 3." in shown
    size = sum(len(text.encode()) for text in DOCUMENTS if text != DOCUMENTS[1])
    targets = report["rows"][0]["targets"]
    assert f"n = 3 documents, {targets} targets of {size} bytes;" in shown
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_on_the_command_line_results_are_kept_and_the_same_command_goes_on(tmp_path: Path) -> None:
    lines = [{"text": text} for text in DOCUMENTS]
    data, out = tmp_path / "story.jsonl", tmp_path / "out"
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    command = ["eval", "lm", str(source_directory()), "--data", str(data), "--protocol", "stream"]
    command += ["--chunk", "5", "--context", "7", "--limit", "2", "--no-controls", "-o", str(out)]
    failed = tintc(*command, "--inner-lr", "1e30", "-q")
    assert failed.code == 5 and failed.err.count("\n") == 1
    assert "the losses of document 0 ('The river rises" in failed.err
    done = tintc(*command, "--inner-lr", "0.01", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert report.pop("json_version") and report == json.loads((out / "report.json").read_text())
    assert report["units"] == {"found": 2, "computed": 4}
    assert [row["name"] for row in report["rows"]] == [
        UNMODIFIED,
        f"{SIMULATOR} (paper)",
        DYNAMIC,
    ]
    assert report["settings"]["cut"]["chunk"] == 5
