"""`tintc run --generate`, `--prompt` and `--each`: what Hugging Face's model generates under the
updated weights, and what is printed when.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor

import tintc as package
from tests.cli.test_streams import run, unread
from tests.support.artifacts import POSITIONS, TEXT, artifact, source_directory
from tests.support.command import tintc
from tintc import interrupts
from tintc.commands import console
from tintc.commands.continuing import Continuing
from tintc.commands.generating import Sampling
from tintc.commands.said import settled
from tintc.runtime.simulator import Simulator

SEA, HILLS = "The sea is wide", "Over the hills and"
EXACT = ("--dtype", "float64")
PROMPTED = ("--text", TEXT, "--prompt", SEA, *EXACT)


@cache
def simulator() -> Simulator:
    return package.load(artifact(), dtype=torch.float64)


def ids_of(text: str) -> Tensor:
    return torch.tensor([simulator().tokenizer(text)["input_ids"]])


def text_of(ids: Tensor) -> str:
    return str(simulator().tokenizer.decode(ids, skip_special_tokens=True))


@cache
def huggingface(context: str) -> Any:
    """The auxiliary model with the weights that all of a text gave."""
    model = transformers.OPTForCausalLM.from_pretrained(source_directory(), dtype=torch.float64)
    ids = ids_of(context)
    model.load_state_dict(simulator().updated_state_dict(ids, torch.ones_like(ids)))
    return model.eval()


def generated(context: str, prompt: str, count: int, **options: Any) -> str:
    ids = ids_of(prompt)
    end = simulator().tokenizer.eos_token_id
    found = huggingface(context).generate(
        ids, max_new_tokens=count, eos_token_id=end, **{"do_sample": False, **options}
    )
    return text_of(found[0, ids.shape[1] :])


def ran(*arguments: object, code: int = 0) -> Any:
    done = tintc("run", artifact(), *arguments)
    assert done.code == code, done.err
    return done


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is written on standard output as it comes."""
    found: list[str] = []
    write = console.write

    def kept(text: str) -> None:
        found.append(text)
        write(text)

    monkeypatch.setattr(console, "write", kept)
    return found


class TestPrompt:
    def test_another_text_under_the_weights_that_the_first_gave(self) -> None:
        found = ran(*PROMPTED, "--generate", 12, "--json").document
        assert found["generated"] == generated(TEXT, SEA, 12)
        assert found["generated"] != generated(SEA, SEA, 12)
        assert (found["tokens"], found["predicted_tokens"]) == (ids_of(TEXT).shape[1], 0)
        assert found["trained_tokens"] == found["tokens"]
        assert found["prompt_tokens"] == ids_of(SEA).shape[1]
        assert found["generated_tokens"] == 12
        assert found["tokens_per_second"] > 0
        assert found["adapt_seconds"] > 0

    def test_part_of_the_text_may_be_trained(self) -> None:
        found = ran(*PROMPTED, "--generate", 2, "--train-fraction", 0.5, "--json").document
        alone = ran("--text", TEXT, *EXACT, "--json").document
        assert found["trained_tokens"] == alone["trained_tokens"] < found["tokens"]
        for name in ("loss_before", "loss_after"):
            assert found[name] == pytest.approx(alone[name], rel=1e-9)

    def test_from_a_file_and_from_standard_input(self, tmp_path: Path) -> None:
        file = tmp_path / "question.json"
        file.write_text('{"sea": "wide"}')
        options = ("--text", TEXT, "--generate", 3)
        expected = ran(*options, "--prompt", '{"sea": "wide"}').out
        assert ran(*options, "--prompt-file", file).out == expected
        done = tintc("run", artifact(), *options, "--prompt-file", "-", stdin=file.read_bytes())
        assert done.out == expected

    def test_how_many_follow_unless_told(self) -> None:
        done = ran("--text", TEXT, "--prompt", SEA, "--json")
        room = POSITIONS - ids_of(SEA).shape[1]
        assert done.document["generated_tokens"] <= room
        assert f"there is room for {room} of 128 generated tokens" in done.err

    def test_no_room_at_all(self) -> None:
        prompt = text_of(ids_of(" ".join([TEXT] * 4))[0, :POSITIONS])
        assert ids_of(prompt).shape[1] == POSITIONS
        done = ran("--text", TEXT, "--prompt", prompt, "--generate", 3, "--json")
        assert (done.document["generated"], done.document["tokens_per_second"]) == ("", None)
        assert "there is room for 0 of 3" in done.err

    def test_the_transformer_back_end_has_no_cache(self, tmp_path: Path) -> None:
        path = tmp_path / "sim"
        assert tintc("compile", artifact(), "-o", path, "--backend", "transformer").code == 0
        options = ("--text", TEXT, "--prompt", SEA, "--generate", 3, *EXACT, "--json")
        found = tintc("run", path, *options).document
        assert found["generated"] == generated(TEXT, SEA, 3)


class TestPrinted:
    def test_tokens_come_one_by_one(self, pieces: list[str]) -> None:
        done = ran(*PROMPTED, "--generate", 12)
        expected = generated(TEXT, SEA, 12)
        assert "".join(pieces) == expected + "\n"
        assert len(pieces) > 8
        assert done.out.endswith("\n" + expected + "\n")

    def test_not_with_json(self, pieces: list[str]) -> None:
        assert ran(*PROMPTED, "--generate", 3, "--json").document
        assert pieces == []

    def test_half_a_character_waits(self) -> None:
        ends = {"caf\ufffd": 3, "caf\u00e9": 4, "so E": 3, "so EN": 3, "so ENd": 6, "so N": 3}
        assert {text: settled(text, ["END", "Ne"]) for text in ends} == ends

    def test_ctrl_c_keeps_what_was_printed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        write, count = console.write, 0

        def interrupted(text: str) -> None:
            nonlocal count
            write(text)
            count += 1
            if count == 3:
                raise KeyboardInterrupt

        expected = generated(TEXT, SEA, 12)
        monkeypatch.setattr(console, "write", interrupted)
        done = ran(*PROMPTED, "--generate", 12, code=130)
        interrupts.forget()
        assert done.err == "error: interrupted\n"
        last = done.out.splitlines()[-1]
        assert expected.startswith(last)
        assert 0 < len(last) < len(expected)
        assert done.out.endswith("\n")

    def test_a_pipe_that_nobody_reads_any_more(self) -> None:
        with unread() as stdout:
            command = "run ARTIFACT --text the_river_and_the_sea --prompt the_sea --generate 3"
            assert run(command, stdout) == (0, "")


class TestSampling:
    OPTIONS = (*PROMPTED, "--generate", 12, "--json")

    def drawn(self, *more: object) -> str:
        return str(ran(*self.OPTIONS, *more).document["generated"])

    def test_a_seed_gives_the_draws_of_transformers(self) -> None:
        more = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
        huggingface(TEXT)  # made once, which draws numbers too
        torch.manual_seed(3)
        expected = generated(TEXT, SEA, 12, **more)
        options = ("--temperature", 0.7, "--top-p", 0.9)
        assert self.drawn(*options, "--seed", 3) == expected
        assert self.drawn(*options, "--seed", 4) != expected

    def test_the_seed_is_0_unless_told(self) -> None:
        assert self.drawn("--temperature", 1) == self.drawn("--temperature", 1, "--seed", 0)

    @pytest.mark.parametrize("temperature", [1e-5, 1e-60])
    def test_the_coldest_is_greedy(self, temperature: float) -> None:
        assert self.drawn("--temperature", temperature) == generated(TEXT, SEA, 12)


class TestStop:
    def test_in_front_of_a_text(self, pieces: list[str]) -> None:
        whole = generated(TEXT, SEA, 12)
        new = [text_of(torch.tensor([token])) for token in ids_of(whole)[0].tolist()]
        stop = next(b for a, b in pairwise(new) if a != b)
        stop = whole[: whole.index(stop)][-2:] + stop  # across two tokens, often begun in vain
        before = whole[: whole.index(stop)]
        options = (*PROMPTED, "--generate", 12, "--stop", "never there", "--stop", stop)
        found = ran(*options, "--json").document
        assert found["generated"] == before
        assert found["generated_tokens"] < 12
        ran(*options)
        assert "".join(pieces) == before + "\n"

    def test_a_text_of_the_prompt_stops_nothing(self) -> None:
        found = ran(*PROMPTED, "--generate", 5, "--stop", SEA, "--json").document
        assert found["generated"] == generated(TEXT, SEA, 5)

    @pytest.mark.parametrize("how", ["end token", "special token as a stop text"])
    def test_tokens(self, how: str) -> None:
        """A token of what would come is made one that ends."""
        context, prompt = ids_of(TEXT), ids_of(SEA)
        adapted = simulator().adapt(context, torch.ones_like(context))
        alone = Continuing(simulator(), Sampling(), 12)
        whole = huggingface(TEXT).generate(prompt, max_new_tokens=12, do_sample=False)
        new = whole[0, prompt.shape[1] :].tolist()
        end = next(n for n in range(1, 12) if new[n] not in new[:n])
        tokenizer = simulator().tokenizer
        name = tokenizer.convert_ids_to_tokens(new[end])
        if how == "end token":
            before, tokenizer.eos_token = tokenizer.eos_token, name
            ended = Continuing(simulator(), Sampling(), 12)
            tokenizer.eos_token = before
        else:
            with mock.patch.object(type(tokenizer), "all_special_tokens", [name]):
                ended = Continuing(simulator(), Sampling(stop=[name]), 12)
        assert alone.rows(adapted, prompt.tolist(), lambda _: None)[0].tokens == 12
        found = ended.rows(adapted, prompt.tolist(), lambda _: None)[0]
        assert (found.tokens, found.text) == (end, text_of(torch.tensor(new[:end])))


class TestEach:
    LINES = (
        {"id": "first", "context": TEXT, "prompt": SEA},
        {"context": f"{SEA} and deep, and the boats go out.", "prompt": HILLS},
        {"id": 3, "context": TEXT, "prompt": HILLS, "further": "is left alone"},
    )

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "questions.jsonl"
        path.write_text("\n\n".join(json.dumps(line) for line in self.LINES))
        return path

    @pytest.mark.parametrize("batch", [1, 2, 8])
    def test_each_is_as_it_is_alone(self, batch: int, file: Path) -> None:
        done = ran("--each", file, "--generate", 6, "--batch", batch, *EXACT)
        assert done.err == ""
        found = [json.loads(line) for line in done.out.splitlines()]
        assert [(row["line"], row.get("id")) for row in found] == [(1, "first"), (3, None), (5, 3)]
        for row, line in zip(found, self.LINES, strict=True):
            assert row["generated"] == generated(str(line["context"]), str(line["prompt"]), 6)
            assert row["trained_tokens"] == ids_of(str(line["context"])).shape[1]
            assert row["prompt_tokens"] == ids_of(str(line["prompt"])).shape[1]

    def test_one_document(self, file: Path) -> None:
        options = ("--each", file, "--generate", 3)
        found = ran(*options, "--json").document
        assert found["lines"] == [json.loads(line) for line in ran(*options).out.splitlines()]
        assert found["generated_tokens"] == 9
        assert found["tokens_per_second"] > 0

    def test_a_context_of_several_lines_is_trained_once(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapt, batches = Simulator.adapt, []

        def counted(self: Simulator, ids: Tensor, *given: Any, **more: Any) -> Any:
            batches.append(len(ids))
            return adapt(self, ids, *given, **more)

        monkeypatch.setattr(Simulator, "adapt", counted)
        ran("--each", file, "--generate", 2, "--batch", 1)
        assert batches == [1, 1]

    def test_where_not_all_have_room(self, tmp_path: Path) -> None:
        long = text_of(ids_of(" ".join([TEXT] * 4))[0, : POSITIONS - 2])
        path = tmp_path / "long.jsonl"
        lines = ({"context": TEXT, "prompt": SEA}, {"context": TEXT, "prompt": long})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = ran("--each", path, "--generate", 6, *EXACT)
        first, second = (json.loads(line) for line in done.out.splitlines())
        assert first["generated"] == generated(TEXT, SEA, 6)
        assert second["generated"] == generated(TEXT, long, 2)
        assert "there is room for 2 of 6" in done.err

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("{", "it is no JSON object"),
            ("[1]", "it holds a list; expected an object"),
            ('{"context": "a b c"}', "its prompt is missing; expected a text"),
            ('{"context": 3, "prompt": "a"}', "its context is a int; expected a text"),
            ('{"context": "a b c", "prompt": "  "}', "the prompt is empty"),
            ('{"context": "", "prompt": "a"}', "the context is empty"),
            (json.dumps({"context": TEXT, "prompt": TEXT * 9}), "the prompt has more than 64"),
            (json.dumps({"context": TEXT * 9, "prompt": "a"}), "the context has more than 64"),
            (b"caf\xe9", "it is not UTF-8 text"),
        ],
    )
    def test_a_bad_line(self, line: str | bytes, words: str, file: Path) -> None:
        """Nothing is computed, and nothing printed."""
        raw = line.encode() if isinstance(line, str) else line
        file.write_bytes(file.read_bytes() + b"\n" + raw + b"\n")
        message = tintc("run", artifact(), "--each", file).refused(2)
        assert words in message
        assert "questions.jsonl, line 6: " in message

    def test_no_lines(self, tmp_path: Path) -> None:
        (tmp_path / "none.jsonl").write_text("\n")
        done = tintc("run", artifact(), "--each", tmp_path / "none.jsonl")
        assert "holds no lines" in done.refused(2)
        assert "cannot read" in tintc("run", artifact(), "--each", tmp_path / "x").refused(2)

    def test_what_diverges_is_named(self, file: Path) -> None:
        done = tintc("run", artifact(), "--each", file, "--inner-lr", 1e38, "--generate", 2)
        assert "line 1: the logits after the inner training are not finite" in done.refused(5)


def test_documents_are_asked_one_by_one(tmp_path: Path) -> None:
    for number, text in enumerate((TEXT, f"{SEA}, and the boats go out.")):
        (tmp_path / f"{number}.txt").write_text(text)
    options = ("--prompt", HILLS, "--generate", 4, *EXACT)
    found = ran("--file", tmp_path, *options, "--json").document["documents"]
    for row, file in zip(found, sorted(tmp_path.iterdir()), strict=True):
        assert row["generated"] == generated(file.read_text(), HILLS, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--text a --temperature 1", "--temperature: nothing is generated; pass --generate N"),
        ("--text a --stop x --seed 1", "--seed, --stop: nothing is generated"),
        ("--text a --generate 0 --stop x", "--stop: nothing is generated"),
        ("--text a --generate 2 --top-p 0.5", "--top-p without --temperature"),
        ("--text a --generate 2 --seed 5", "--seed without --temperature"),
        ("--text a --generate 2 --temperature 0", "temperature is 0; expected a number above 0"),
        ("--text a --generate 2 --temperature nan", "temperature is nan"),
        ("--text a --generate 2 --temperature 1 --top-p 0", "top-p is 0; expected above 0 and"),
        ("--text a --generate 2 --temperature 1 --top-p 1.5", "top-p is 1.5"),
        ("--text a --generate 2 --temperature 1 --seed -1", "seed is -1; expected 0 or more"),
        ("--text a --generate 2 --stop=", "stop is an empty text"),
        ("--text a --prompt b --prompt-file c", "pass one of --prompt TEXT and --prompt-file"),
        ("- --prompt-file -", "standard input is both the text and the prompt"),
        ("--prompt b", "pass one of --text TEXT, --file FILE"),
        ("--text a --stream --prompt b", "--prompt with --stream"),
        ("--text a --stream --stop b", "--stop with --stream"),
        ("--text a --each f", "--text with --each"),
        ("--each f --prompt b", "--prompt with --each"),
        ("--each f --stream", "--each with --stream"),
        ("--adapted f", "--adapted without a text to continue; pass --prompt TEXT too"),
        ("--adapted f --generate 3", "--adapted without a text to continue"),
        ("--adapted f --prompt b --text a", "--text with --adapted"),
        ("--adapted f --prompt b --inner-lr 1", "--inner-lr with --adapted"),
        ("--adapted f --each g", "--each with --adapted"),
    ],
)
def test_what_does_not_go_together(options: str, words: str) -> None:
    assert words in tintc("run", "x", *options.split()).refused(2)


def test_onnx_models_only_go_on() -> None:
    done = tintc("run", "x.onnx", "--text", "a", "--generate", 2, "--stop", "b")
    assert "--stop: an ONNX model only goes on with its text" in done.refused(2)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "the prompt is empty"), (TEXT * 9, "the prompt has more than 64 tokens")],
)
def test_prompts_that_cannot_be_continued(prompt: str, words: str) -> None:
    assert words in tintc("run", artifact(), "--text", TEXT, "--prompt", prompt).refused(2)
