"""`tintc export --pair`, and `tintc run` on its folder, without torch and transformers."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from tests.support.artifacts import POSITIONS, TEXT, artifact, source_directory
from tests.support.command import process, tintc
from tests.support.nano import nano
from tintc import export_onnx_pair, load
from tintc.commands import run_pair
from tintc.commands.said import Said, Sampler
from tintc.compiler.driver import compile as compile_model
from tintc.ir.config import SimulatorConfig

PROMPT = "The sea"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tintc-pair-")


@functools.cache
def pair() -> Path:
    """The tiny artifact, exported once; read only."""
    path = Path(_folder().name) / "pair"
    assert tintc("export", artifact(), "--onnx", path, "--pair", "--no-check", "-q").code == 0
    return path


class TestExport:
    def test_summary(self, tmp_path: Path) -> None:
        done = tintc("export", artifact(), "--onnx", tmp_path / "p", "--pair")
        assert done.code == 0, done
        for expected in (
            "operators of opset 20", "input_ids, train_mask, inner_lr", "past_key_values.NAME",
            "updates.NAME", "logits, 4 present.NAME", "error of updates", "error of logits",
        ):  # fmt: skip
            assert expected in done.out
        assert f"next: tintc run {tmp_path / 'p'} --file FILE --generate 200" in done.err

    def test_json(self, tmp_path: Path) -> None:
        options = ("--with", "attention_mask", "--optimize", "--opset", 21, "--json", "-q")
        done = tintc("export", artifact(), "--onnx", tmp_path / "p", "--pair", *options)
        assert (done.code, done.err) == (0, ""), done
        for name in ("adapt.onnx", "decode.onnx"):
            session = onnxruntime.InferenceSession(str(tmp_path / "p" / name))
            takes = [*session.get_inputs(), *session.get_overridable_initializers()]
            assert set(done.document["inputs"][name]) == {value.name for value in takes}
            assert done.document["outputs"][name] == [v.name for v in session.get_outputs()]
        assert "attention_mask" in done.document["inputs"]["adapt.onnx"]
        assert done.document["check"]["agrees"]
        assert (tmp_path / "p" / "tokenizer.json").is_file()

    def test_force(self, tmp_path: Path) -> None:
        command = ("export", artifact(), "--onnx", tmp_path / "p", "--pair", "--no-check")
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "mine").touch()
        assert "--force" in tintc(*command).refused(2)
        assert "is no ONNX pair" in tintc(*command, "--force").refused(2)
        (tmp_path / "p" / "mine").unlink()
        for _ in range(2):
            assert tintc(*command, "--force").code == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--stream",), "--stream with --pair"),
            (("--chunk", 6, "--keys", "cache"), "--chunk, --keys with --pair"),
            (("--external-data",), "--external-data with --pair"),
            (("--with", "losses"), "a pair has outputs of its own"),
            (("--opset", 9), "opset is 9"),
            (("--dtype", "bfloat16"), "float32, float64 or float16"),
        ],
    )
    def test_refused(self, options: tuple[Any, ...], message: str, tmp_path: Path) -> None:
        done = tintc("export", artifact(), "--onnx", tmp_path / "p", "--pair", *options)
        assert message in done.refused(2)
        assert not list(tmp_path.iterdir())

    def test_bad_targets_and_the_transformer_back_end(self, tmp_path: Path) -> None:
        to_file = ("export", artifact(), "--onnx", tmp_path / "p.onnx", "--pair")
        assert "expected the name of a folder" in tintc(*to_file).refused(2)
        made = ("-o", tmp_path / "t", "--backend", "transformer", "-q")
        assert tintc("compile", source_directory(), *made).code == 0
        done = tintc("export", tmp_path / "t", "--onnx", tmp_path / "p", "--pair")
        assert "needs the fused back end" in done.refused(2)
        assert not (tmp_path / "p").exists()


class TestRun:
    @pytest.mark.parametrize(
        "options", [(), ("--train-fraction", 0.2), ("--inner-lr", 0.001), ("--tokens", 9)]
    )
    def test_same_as_the_artifact(self, options: tuple[Any, ...]) -> None:
        found = tintc("run", pair(), "--text", TEXT, "--json", *options).document
        expected = tintc("run", artifact(), "--text", TEXT, "--json", *options).document
        assert found.pop("rule") == expected.pop("rule") == {}
        assert found == pytest.approx(expected, rel=1e-4)

    def test_long_texts_are_read_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        command = ("run", pair(), "--text", TEXT, "--train-fraction", 0.4, "--json")
        expected = tintc(*command).document
        monkeypatch.setattr(run_pair, "_PART", 5)
        found = tintc(*command).document
        assert found.pop("rule") == expected.pop("rule")
        assert found == pytest.approx(expected, rel=1e-5)

    def test_generate(self) -> None:
        """Token by token what torch generates from the same updates."""
        command = ("--text", TEXT, "--train-fraction", 1, "--generate", 12)
        found = tintc("run", pair(), *command)
        expected = tintc("run", artifact(), *command, "--json").document["generated"]
        assert (found.code, found.err) == (0, "")
        assert found.out.endswith("\n")
        assert found.out[:-1].endswith(expected)
        document = tintc("run", pair(), *command, "--json").document
        assert document["generated"] == expected
        assert document["generated_tokens"] == 12
        assert document["tokens_per_second"] > 0
        assert document["adapt_seconds"] > 0

    def test_to_the_last_position(self) -> None:
        long = " ".join([TEXT] * 10)
        options = ("--text", long, "--tokens", POSITIONS - 3, "--generate", 5, "--json")
        done = tintc("run", pair(), *options)
        assert "there is room for 3 of 5" in done.err
        assert done.document["generated_tokens"] == 3

    def test_a_prompt(self) -> None:
        """Continued under what the text gave, without the text in front of it."""
        options = ("--text", TEXT, "--prompt", PROMPT, "--generate", 8, "--json")
        document = tintc("run", pair(), *options).document
        found = document["generated"]
        assert document["trained_tokens"] == document["tokens"]  # all, as with a simulator
        sim = load(artifact())
        context, start = (sim.tokenizer(text, return_tensors="pt") for text in (TEXT, PROMPT))
        ids = context["input_ids"]
        adapted = sim.adapt(ids, torch.ones_like(ids))
        tokens = adapted.generate(start["input_ids"], max_new_tokens=8, do_sample=False)
        new = tokens[0, start["input_ids"].shape[1] :]
        assert found == sim.tokenizer.decode(new, skip_special_tokens=True)

    def test_samples(self) -> None:
        """A seed draws the same, another one something else; a stop text is left out."""
        command = ("run", pair(), "--text", TEXT, "--generate", 9, "--temperature", 2)
        command = (*command, "--top-p", 0.9, "--seed")
        said = [tintc(*command, n, "--json").document["generated"] for n in (1, 1, 2)]
        assert said[0] == said[1] != said[2]
        stop = said[0][4:7]
        expected = said[0][: said[0].index(stop)]
        assert tintc(*command, 1, "--stop", stop, "--json").document["generated"] == expected
        assert tintc(*command, 1, "--stop", stop).out.splitlines()[-1] == expected

    def test_options_without_meaning(self, tmp_path: Path) -> None:
        (tmp_path / "each.jsonl").write_text('{"context": "a", "prompt": "b"}')
        each = tintc("run", pair(), "--each", tmp_path / "each.jsonl").refused(2)
        assert "--each: a pair trains on one text" in each
        adapted = tintc("run", pair(), "--adapted", tmp_path, "--prompt", PROMPT).refused(2)
        assert "--adapted: a pair" in adapted
        long = " ".join([TEXT] * 10)
        assert "the prompt has" in tintc("run", pair(), "--text", TEXT, "--prompt", long).refused(2)

    @pytest.mark.parametrize("further", ["attention_mask,loss_mask,position_ids", "pair_mask"])
    def test_further_inputs_are_filled_in(self, further: str, tmp_path: Path) -> None:
        export_onnx_pair(
            load(artifact()), tmp_path / "p", inputs=further.split(","), check=False
        )  # fmt: skip
        found, expected = (
            tintc("run", path, "--text", TEXT, "--json").document
            for path in (tmp_path / "p", pair())
        )
        assert found.pop("rule") == expected.pop("rule") == {}
        assert found == pytest.approx(expected, rel=1e-4)

    def test_without_torch(self) -> None:
        """An import of torch, transformers or onnx would end it; tintc's compiler imports them."""
        code = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "datasets", "onnx"):
            raise ImportError(f"{{name}} is asked for")
sys.meta_path.insert(0, Refuse())
from tintc.cli import call
call(["run", {str(pair())!r}, "--text", {TEXT!r}, "--generate", "5", "--json"])
"""
        done = process(code=code)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["generated_tokens"] == 5

    def test_refused(self, tmp_path: Path) -> None:
        text = ("--text", TEXT)
        broken = tmp_path / "broken"
        shutil.copytree(pair(), broken)
        assert "pass --tokens" in tintc("run", broken, "--text", " ".join([TEXT] * 10)).refused(2)
        assert "pass a smaller --inner-lr" in tintc(
            "run", broken, *text, "--inner-lr", 1e30
        ).refused(5)
        for option in (("--device", "cpu"), ("--stream",), ("--batch", 2)):
            assert "expected neither" in tintc("run", broken, *text, *option).refused(2)
        one = tintc("run", broken / "decode.onnx", *text).refused(2)
        assert "one of a pair's two models" in one
        shutil.copy(broken / "adapt.onnx", broken / "decode.onnx")
        assert "do not belong together" in tintc("run", broken, *text).refused(1)
        (broken / "adapt.onnx").write_text("no model")
        assert "cannot be read as an ONNX model" in tintc("run", broken, *text).refused(1)
        (broken / "adapt.onnx").unlink()
        assert "does not exist" in tintc("run", broken, *text).refused(1)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        simulator = compile_model(nano().float(), SimulatorConfig.paper())
        export_onnx_pair(simulator, tmp_path / "p", check=False)
        assert "tokenizer" in tintc("run", tmp_path / "p", "--text", TEXT).refused(2)


class TestSampling:
    @pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05])
    def test_probabilities_are_those_of_transformers(self, top_p: float) -> None:
        logits = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        warped = TemperatureLogitsWarper(0.7)(None, logits[None])
        expected = TopPLogitsWarper(top_p)(None, warped).softmax(-1)[0]
        found = Sampler(0.7, top_p).probabilities(logits.numpy())
        assert np.allclose(found, expected.numpy(), atol=1e-12)

    def test_coldest_is_greedy(self) -> None:
        logits = np.array([1.0, 3.0, 2.999], np.float32)
        assert Sampler(1e-9).choose(logits) == Sampler().choose(logits) == 1

    def test_text_waits_for_what_may_end_it(self) -> None:
        class Letters:
            def decode(self, ids: list[int], **_: Any) -> str:
                return bytes(ids).decode("utf-8", errors="replace")

        said = Said(Letters(), ["ab!"])  # type: ignore[arg-type]
        parts = [said.add(token) for token in "xéabc".encode()]
        assert parts == ["x", "", "é", "", "", "abc"]
        more = [said.add(token) for token in b"yab!z"]
        assert more[:4] == ["y", "", "", ""]
        assert said.text == "xéabcy" or not said.ended
