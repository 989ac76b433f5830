"""`tintc run --stream`: its numbers against autograd, its files, and how it stops and goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tintc as package
from tests.oracle.streaming import streamed
from tests.support.artifacts import TEXT, artifact, source_directory
from tests.support.command import Finished, tintc
from tintc.commands.documents import Document
from tintc.commands.stream_totals import Totals
from tintc.compiler.casts import no_casts
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.runtime.reading import Piece

CHUNK, CONTEXT = 6, 12
SIZES = ("--stream", "--chunk", CHUNK, "--context", CONTEXT)
EXACT = ("--dtype", "float64")
LONG = f"{TEXT} The caf\u00e9 \u4e2d\u6587 \U0001f600 stands by the sea, and {TEXT}"
LIMIT = 1e-9


def ran(*arguments: object, code: int = 0) -> Finished:
    done = tintc("run", artifact("exact"), *arguments)
    assert done.code == code, done.err
    return done


@cache
def losses_of(text: str, keys: str, rate: float = 0.01) -> Tensor:
    """Of each target, by autograd, in the order of the text."""
    simulator = package.load(artifact("exact"))
    model = AutoModelForCausalLM.from_pretrained(source_directory()).double()
    config = dataclasses.replace(simulator.config, inner_lr=rate)
    ids = torch.tensor(simulator.tokenizer(text)["input_ids"])
    with no_casts():
        found = streamed(
            model, config, [ids], updated_parameters(simulator), chunk=CHUNK, context=CONTEXT,
            keys=keys, longest=simulator.program.facts.longest,
        )  # fmt: skip
    return found.losses[0]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def near(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=LIMIT)


class TestNumbers:
    @pytest.mark.parametrize("keys", ["recompute", "cache"])
    def test_against_autograd(self, keys: str, tmp_path: Path) -> None:
        file = tmp_path / "scores.jsonl"
        given = ("--text", LONG, *SIZES, *EXACT, "--keys", keys)
        found = ran(*given, "--scores", file, "--json").document
        before, after = losses_of(LONG, keys, 0.0), losses_of(LONG, keys)
        assert abs(float(after.sum() - before.sum())) > 0.1
        count, size = len(after), len(LONG.encode())
        assert (found["scored_tokens"], found["tokens"]) == (count, count + 1)
        assert (found["bytes"], found["bytes_counted"]) == (size, "all")  # OPT's texts begin </s>
        for name, losses in (("before", before), ("after", after)):
            total = float(losses.sum())
            assert near(found[f"nll_{name}"], total)
            assert near(found[f"perplexity_{name}"], math.exp(total / count))
            assert near(found[f"bits_per_byte_{name}"], total / math.log(2) / size)
        for part in found["curve"]:
            targets = slice(part["first"] - 1, part["last"])
            assert near(part["loss_after"], float(after[targets].mean()))
            assert near(part["loss_before"], float(before[targets].mean()))
        assert sum(part["scored_tokens"] for part in found["curve"]) == count
        for line, b, a in zip(lines(file), before.tolist(), after.tolist(), strict=True):
            assert near(line["loss_before"], b)
            assert near(line["loss_after"], a)

    def test_documents_side_by_side_are_those_alone(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        texts = {"a.txt": LONG, "b.txt": TEXT, "c.txt": f"{TEXT} {LONG}", "d.text": "left out"}
        (tmp_path / "docs").mkdir()
        for name, text in texts.items():
            (tmp_path / "docs" / name).write_text(text)
        found = ran(
            "--file", tmp_path / "docs", *SIZES, *EXACT, "--batch", 2, "--json", "-v"
        ).document
        assert {"reading c.txt", "chunk 1", "chunk 9"} <= set(caplog.messages)
        assert [row["name"] for row in found["documents"]] == ["a.txt", "b.txt", "c.txt"]
        for row in found["documents"]:
            expected = losses_of(texts[row["name"]], "recompute")
            assert near(row["nll_after"], float(expected.sum()))
            assert row["bytes"] == len(texts[row["name"]].encode())
        for name in ("nll_before", "nll_after", "scored_tokens", "bytes"):
            assert near(found[name], sum(row[name] for row in found["documents"]))

    def test_never_carries_weights_on(self, tmp_path: Path) -> None:
        (tmp_path / "docs.jsonl").write_text(2 * (json.dumps({"text": TEXT}) + "\n"))
        given = ("--file", tmp_path / "docs.jsonl", *SIZES, "--json")
        anew = [row["nll_after"] for row in ran(*given).document["documents"]]
        on = [row["nll_after"] for row in ran(*given, "--reset", "never").document["documents"]]
        assert anew[0] == anew[1] == on[0]
        assert on[1] < anew[1] - 0.1
        table = ran(*given[:-1], "--reset", "never", "--batch", 2).out
        assert "with another --batch results differ" in " ".join(table.split())

    def test_the_curve_of_a_long_text_has_few_parts(self) -> None:
        ids = torch.zeros(1001, dtype=torch.int64)
        totals = Totals([Document(0, "long", ids, b"", 0, None)], 4)
        losses = torch.arange(1000.0)
        for start in range(0, 1000, 4):
            part = losses[start : start + 4]
            totals.add(Piece(0, start + 1, part, part + 1, start == 996))
        curve = totals.curve()
        assert [part["first"] for part in curve] == list(range(1, 1001, 64))
        assert curve[-1]["last"] == 1000
        for part in curve:
            mean = float(losses[part["first"] - 1 : part["last"]].mean())
            assert (part["loss_after"], part["loss_before"]) == (mean, mean + 1)
        assert totals.overall()["bytes"] is totals.overall()["bits_per_byte_after"] is None

    def test_without_a_bos_the_first_token_has_no_score_and_its_bytes_do_not_count(self) -> None:
        document = Document(0, "x", torch.arange(3), b"abcdef", 0, [(0, 3), (3, 4), (4, 6)])
        totals = Totals([document], 2)
        nats = torch.tensor([math.log(2)] * 2)
        totals.add(Piece(0, 1, nats, 2 * nats, True))
        found = totals.overall()
        assert (found["bytes"], found["bytes_counted"]) == (3, "all but those of the first token")
        assert found["bits_per_byte_after"] == pytest.approx(2 / 3)
        assert found["bits_per_byte_before"] == pytest.approx(4 / 3)


class TestScores:
    def test_text_and_offset_are_those_of_the_document(self, tmp_path: Path) -> None:
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs" / "a.txt").write_text(f" \n{LONG}\n", encoding="utf-8-sig")
        (tmp_path / "docs" / "b.txt").write_text(TEXT)
        file = tmp_path / "new" / "scores.jsonl"
        ran("--file", tmp_path / "docs", *SIZES, "--scores", file)
        tokenizer = package.load(artifact("exact")).tokenizer
        for number, (name, text) in enumerate((("a.txt", LONG), ("b.txt", TEXT))):
            content = (tmp_path / "docs" / name).read_bytes()
            rows = [row for row in lines(file) if row["document"] == number]
            assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
            assert [row["token"] for row in rows] == tokenizer(text)["input_ids"][1:]
            ends = [row["byte"] for row in rows[1:]] + [rows[0]["byte"] + len(text.encode())]
            for row, end in zip(rows, ends, strict=True):
                assert content[row["byte"] : end].decode(errors="replace") == row["text"]

    def test_an_old_file_is_left_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "scores.jsonl"
        file.write_text("mine")
        for more in ((), ("--state", tmp_path / "state")):
            message = tintc(
                "run", artifact(), "--text", TEXT, *SIZES, "--scores", file, *more
            ).refused(2)
            assert "exists; remove it, or write the scores to another file" in message
        assert file.read_text() == "mine"
        assert not (tmp_path / "state").exists()


class TestBadInput:
    def test_weights_that_diverge_keep_what_was_scored(self, tmp_path: Path) -> None:
        file = tmp_path / "scores.jsonl"
        given = ("--text", LONG, *SIZES, "--inner-lr", 1e30)
        done = ran(*given, "--scores", file, code=5)
        assert "error: --text: chunk 1 of row 0 has losses that are not finite" in done.err
        assert done.err.count("\n") == 1
        assert f"{CHUNK} scored" in done.out
        assert [line["position"] for line in lines(file)] == list(range(1, CHUNK + 1))
        found = ran(*given, "--json", code=5).document
        assert found["stopped"]["chunk"] == 1
        assert "chunk 1 of row 0" in found["stopped"]["reason"]
        assert found["scored_tokens"] == CHUNK
        assert near(found["nll_after"], sum(line["loss_after"] for line in lines(file)))

    def test_one_bad_document_does_not_lose_the_others(self, tmp_path: Path) -> None:
        bad = ("{", json.dumps({"text": "\ud800"}), '{"text": " "}', json.dumps({"txt": TEXT}), "")
        entries = [json.dumps({"text": TEXT}), *bad, json.dumps({"text": f"The sea. {TEXT}"})]
        (tmp_path / "docs.jsonl").write_text("\n".join(entries))
        for more, mark in ((SIZES, "nll_after"), ((), "loss_after")):
            done = ran("--file", tmp_path / "docs.jsonl", *more, "--json", code=2)
            assert "4 of 6 documents failed; the first is docs.jsonl, line 2" in done.err
            rows = done.document["documents"]
            assert [row["document"] for row in rows] == list(range(6))
            assert [mark in row for row in rows] == [True, False, False, False, False, True]
            reasons = [row["error"] for row in rows if "error" in row]
            for reason, words in zip(
                reasons, ("no JSON object", "not UTF-8", "is empty", 'a "text"'), strict=True
            ):
                assert words in reason
            text = ran("--file", tmp_path / "docs.jsonl", *more, code=2).out
            assert "docs.jsonl, line 4: the text is empty" in text

    @pytest.mark.slow
    def test_nothing_but_bad_documents(self, tmp_path: Path) -> None:
        (tmp_path / "docs.jsonl").write_text('{"text": ""}\n')
        for more in (SIZES, ()):
            assert (
                "1 of 1 documents failed"
                in ran("--file", tmp_path / "docs.jsonl", *more, code=2).err
            )
        (tmp_path / "docs.jsonl").write_text("\n")
        assert "holds no documents" in tintc(
            "run", artifact(), "--file", tmp_path / "docs.jsonl"
        ).refused(2)
        assert "No such file" in tintc("run", artifact(), "--file", "none.jsonl").refused(2)

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (("--stream",), "this model takes 64"),
            (("--stream", "--chunk", 0), "chunk is 0; expected a whole number, at least 1"),
            (("--stream", "--context", -1), "context is -1; expected"),
            (("--stream", "--context", 60, "--chunk", 5), "windows of 65 tokens"),
            (("--stream", "--keys", "both"), "keys is 'both'; expected one of recompute, cache"),
            (("--stream", "--chunk", "x"), "'--chunk': 'x'; expected a whole number"),
            (("--stream", "--batch", 0), "expected at least 1"),
            (("--stream", "--generate", 3), "--generate with --stream"),
            (("--stream", "--train-fraction", 0.3), "--train-fraction with --stream"),
            (("--stream", "--state", "a", "--scores", "a"), "both --state and --scores"),
            (("--chunk", 3, "--state", "x"), "--chunk, --state: options of --stream"),
        ],
    )
    def test_options(self, more: tuple[object, ...], words: str) -> None:
        assert words in tintc("run", artifact(), "--text", TEXT, *more).refused(2)

    def test_a_document_without_a_target(self) -> None:
        message = tintc("run", artifact(), "--text", TEXT, *SIZES, "--tokens", 1).refused(2)
        assert "--tokens" in message

    def test_onnx_models_do_not_stream(self) -> None:
        for more in (("--stream",), ("--batch", 2)):
            message = tintc("run", "x.onnx", "--text", TEXT, *more).refused(2)
            assert "neither --stream nor --batch" in message
