"""`tintc adapt`: what was learned, as files, and what `tintc run --adapted` goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tintc as package
from tests.oracle.streaming import streamed
from tests.support.artifacts import POSITIONS, TEXT, artifact, source_directory
from tests.support.command import tintc
from tests.support.tolerances import SIMULATOR, error
from tintc.commands import adapt as command
from tintc.compiler.adapted_writer import SavedAdapted
from tintc.compiler.casts import no_casts
from tintc.compiler.peft_adapter import AdapterRow
from tintc.evaluate.speed.benchmark import updated_parameters

SEA = "The sea is wide"
EXACT = ("--dtype", "float64")
LONG = " ".join(f"{TEXT} {n} times the tide came in." for n in range(4))
LIMIT = SIMULATOR[torch.float64]


def ran(*arguments: object, code: int = 0) -> Any:
    done = tintc("adapt", artifact(), *arguments)
    assert done.code == code, done.err
    return done


def loaded(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def ids_of(text: str) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source_directory())
    return torch.tensor([tokenizer(text)["input_ids"]])


@pytest.mark.parametrize("fraction", [None, 0.5])
@pytest.mark.slow
def test_a_checkpoint_of_what_a_call_learns(fraction: float | None, tmp_path: Path) -> None:
    part = () if fraction is None else ("--train-fraction", fraction)
    options = ("--text", TEXT, "-o", tmp_path / "out", "--format", "hf", *EXACT)
    found = ran(*options, *part, "--json").document
    simulator = package.load(artifact(), dtype=torch.float64)
    ids = ids_of(TEXT)
    trained = round((fraction or 1) * ids.shape[1])
    mask = (torch.arange(ids.shape[1]) < trained).long()[None]
    expected = simulator.updated_state_dict(ids, mask)
    model = loaded(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert error(value, expected[name]) < LIMIT, name
    assert (found["tokens"], found["trained_tokens"]) == (ids.shape[1], trained)
    first = ids[:, :trained]
    for which, used in (("before", loaded(source_directory())), ("after", model)):
        with torch.inference_mode():
            loss = float(used(first, labels=first).loss)
        assert found[f"loss_{which}"] == pytest.approx(loss, rel=1e-6), which
    assert found["loss_after"] < found["loss_before"]
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("keys", ["recompute", "cache"])
def test_a_text_of_any_length(keys: str, tmp_path: Path) -> None:
    options = ("--text", LONG, "-o", tmp_path / "out", "--format", "hf", *EXACT, "--json")
    cut = ("--stream", "--chunk", 9, "--context", 12, "--keys", keys)
    found = tintc("adapt", artifact("exact"), *options, *cut).document
    simulator = package.load(artifact("exact"), dtype=torch.float64)
    ids, model = ids_of(LONG), loaded(source_directory())
    assert ids.shape[1] > POSITIONS
    with no_casts():
        expected = streamed(
            model, simulator.config, [ids[0]], updated_parameters(simulator), chunk=9,
            context=12, keys=keys, longest=POSITIONS,
        )  # fmt: skip
    state = loaded(tmp_path / "out").state_dict()
    for name, value in expected.weights.items():
        assert error(state[name], value) < LIMIT, name
    assert found["loss_while_reading"] == pytest.approx(float(expected.losses[0].mean()), rel=1e-8)
    assert (found["chunks"], found["chunk"], found["context"]) == (
        -(-(ids.shape[1] - 1) // 9),
        9,
        12,
    )
    for which, used in (
        ("before", loaded(source_directory())),
        ("after", loaded(tmp_path / "out")),
    ):
        losses = []
        for first in range(1, ids.shape[1], 9):
            seen = ids[:, max(first - 13, 0) : first + 9]
            labels = seen.clone()
            labels[:, : first - max(first - 13, 0)] = -100
            with torch.inference_mode():
                count = int((labels != -100).sum())
                losses.append(float(used(seen, labels=labels).loss) * count)
        mean = sum(losses) / (ids.shape[1] - 1)
        if which == "after" or keys == "recompute":
            assert found[f"loss_{which}"] == pytest.approx(mean, rel=1e-6), which


def test_run_goes_on_from_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = tintc("adapt", artifact(), "--text", TEXT, "-o", out, columns=300)
    assert (done.code, done.err) == (0, "")
    assert [line.split("  ")[0] for line in done.out.splitlines()] == [
        "tokens",
        "inner training",
        "perplexity before",
        "perplexity after",
        "wrote",
    ]
    options = ("--prompt", SEA, "--generate", 9, "--json")
    found = tintc("run", artifact(), "--adapted", out, *options).document
    whole = tintc("run", artifact(), "--text", TEXT, *options).document
    plain = tintc("run", artifact(), "--text", SEA, *options).document
    assert found["generated"] == whole["generated"] != plain["generated"]
    assert found["generated_tokens"] == 9
    other = tintc("run", artifact("exact"), "--adapted", out, *options)
    assert "was adapted with" in other.refused(2)


def test_an_adapted_of_several(tmp_path: Path) -> None:
    simulator = package.load(artifact())
    ids = ids_of(TEXT).repeat(2, 1)
    package.save_adapted(simulator.adapt(ids, torch.ones_like(ids)), tmp_path / "two")
    done = tintc("run", artifact(), "--adapted", tmp_path / "two", "--prompt", SEA)
    assert "holds 2 adapted sequences" in done.refused(2)


def test_what_is_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran("--text", TEXT, "-o", out)
    assert "pass --force to replace it" in tintc(
        "adapt", artifact(), "--text", TEXT, "-o", out
    ).refused(2)
    ran("--text", TEXT, "-o", out, "--force", "--format", "hf")
    assert (out / "config.json").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary").touch()
    tintc("adapt", artifact(), "--text", TEXT, "-o", mine, "--force").refused(2)
    assert [file.name for file in mine.iterdir()] == ["diary"]


def test_a_rate_that_diverges_leaves_nothing(tmp_path: Path) -> None:
    done = tintc("adapt", artifact(), "--text", TEXT, "-o", tmp_path / "o", "--inner-lr", 1e38)
    assert "pass a smaller --inner-lr" in done.refused(5)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = ("--text", TEXT, "-o", tmp_path / "out", "--format", "peft", "--rank", 2)
    found = ran(*options, "--json").document
    assert {row["rank"] for row in found["weights"] if row["rank"]} <= {1, 2}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    done = ran(*options, "--force")
    assert "matrices of rank" in done.out
    assert "relative error at most" in done.out


def test_what_is_said_of_an_adapter() -> None:
    rows = (
        AdapterRow("a.weight", "target_modules", 2, 0.25),
        AdapterRow("b.weight", "target_modules", 4, 0.5),
        AdapterRow("a.bias", "lora_only"),
        AdapterRow("b.bias", "lora_only"),
    )
    assert command.summary(SavedAdapted(Path("x"), "peft", rows)) == (
        "2 matrices of rank 2 to 4, relative error at most 0.5 (b.weight), 2 by lora_only"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--text a", "Missing option '-o' / '--output'"),
        ("-o x", "pass one of --text TEXT, --file FILE"),
        ("-o x --text a --train-fraction 0", "train-fraction is 0; expected above 0"),
        ("-o x --text a --train-fraction 1.5", "train-fraction is 1.5"),
        ("-o x --text a --rank 3", "rank is 3, and only the format peft has ranks"),
        ("-o x --text a --rank full --format hf", "rank is full, and only the format peft"),
        ("-o x --text a --rank 0 --format peft", "rank is '0'; expected full, or a whole number"),
        ("-o x --text a --rank=-1 --format peft", "rank is '-1'"),
        ("-o x --text a --rank x --format peft", "rank is 'x'"),
        ("-o x --text a --format gguf", "format is 'gguf'; expected one of tintc, hf, peft"),
        ("-o x --text a --stream --train-fraction 0.5", "--train-fraction with --stream"),
        ("-o x --text a --chunk 5", "--chunk: options of --stream; pass --stream too"),
        ("-o x --file a.jsonl", "a.jsonl holds documents, and one text is adapted to"),
        ("-o x --text a --inner-lr nan", "inner-lr is nan"),
        ("-o x --text a --device tpu9", "device is 'tpu9'"),
    ],
)
def test_what_makes_no_sense(options: str, words: str) -> None:
    assert words in tintc("adapt", "absent", *options.split()).refused(2)


def test_a_text_that_is_too_long_may_stream(tmp_path: Path) -> None:
    done = tintc("adapt", artifact(), "--text", LONG * 4, "-o", tmp_path / "out")
    assert f"pass --tokens {POSITIONS} to cut it, or --stream to read all" in done.refused(2)
    options = ("--text", LONG, "-o", tmp_path / "out", "--stream", "--chunk", POSITIONS)
    assert "expected smaller ones" in tintc("adapt", artifact(), *options).refused(2)
