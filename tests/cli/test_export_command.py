"""`tintc export`, `tintc run MODEL.onnx` and the example that has neither torch nor
transformers.
"""

import functools
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.support.artifacts import POSITIONS, TEXT, artifact
from tests.support.command import process, tintc
from tests.support.nano import nano
from tintc import export_onnx
from tintc.compiler.driver import compile as compile_model
from tintc.ir.config import SimulatorConfig

ROOT = Path(__file__).parents[2]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tintc-onnx-")


@functools.cache
def model() -> Path:
    """The tiny artifact, exported once; read only."""
    path = Path(_folder().name) / "model.onnx"
    assert tintc("export", artifact(), "--onnx", path, "-q").code == 0
    return path


class TestExport:
    def test_summary(self, tmp_path: Path) -> None:
        done = tintc("export", artifact(), "--onnx", tmp_path / "m.onnx")
        assert done.code == 0, done
        for expected in (
            "operators of opset 20",
            "input_ids, train_mask, inner_lr",
            "error of logits",
            "allowed",
            "text, 1 x",
        ):
            assert expected in done.out
        assert re.fullmatch(
            r"wrote \S+ in [\d.]+ s; next: tintc run \S+ --text '\.\.\.'\n", done.err
        )

    @pytest.mark.slow
    def test_json(self, tmp_path: Path) -> None:
        further = [
            part
            for name in ("attention_mask", "position_ids", "losses")
            for part in ("--with", name)
        ]
        further = [*further[:2], "--with", ",".join(further[3::2])]
        options = (
            "--external-data",
            "--optimize",
            "--opset",
            21,
            "--dtype",
            "float16",
            "--json",
            "-q",
        )
        done = tintc("export", artifact(), "--onnx", tmp_path / "m.onnx", *further, *options)
        assert (done.code, done.err) == (0, ""), done
        session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
        assert done.document["inputs"] == [value.name for value in session.get_inputs()]
        assert done.document["inputs"] == [
            "input_ids",
            "train_mask",
            "attention_mask",
            "position_ids",
            "inner_lr",
            "labels",
        ]
        assert done.document["outputs"] == ["logits", "losses"]
        assert done.document["data"] == str(tmp_path / "m.onnx.data")
        assert done.document["check"]["agrees"]
        assert 0 < done.document["check"]["outputs"]["logits"]["error"] < 0.1
        assert done.document["opset"] == 21

    def test_no_check(self, tmp_path: Path) -> None:
        done = tintc("export", artifact(), "--onnx", tmp_path / "m.onnx", "--no-check", "--json")
        assert done.document["check"] is None
        assert done.document["inputs"] == ["input_ids", "train_mask", "inner_lr"]

    def test_stream(self, tmp_path: Path) -> None:
        """The program of a window; `tintc run` says that it is none of its own."""
        sizes = ("--stream", "--chunk", 6, "--context", 10, "--keys", "cache")
        path = tmp_path / "m.onnx"
        done = tintc("export", artifact(), "--onnx", path, *sizes)
        assert done.code == 0, done
        for expected in ("new_document", "slots.NAME", "past.NAME", "losses", "error of slots"):
            assert expected in done.out
        assert "call it chunk by chunk" in done.err
        done = tintc("export", artifact(), "--onnx", path, *sizes, "--force", "--json", "-q")
        assert (done.code, done.err) == (0, ""), done
        assert done.document["stream"] is True
        assert done.document["outputs"][0] == "losses"
        assert done.document["check"]["agrees"]
        model = onnx.load(path)
        about = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(about["tintc.stream"])["chunk"] == 6
        assert "one window of a stream" in tintc("run", path, "--text", TEXT).refused(2)

    def test_metadata(self) -> None:
        about = {
            entry.key: entry.value
            for entry in onnx.load(model(), load_external_data=False).metadata_props
        }
        assert json.loads(about["tintc.config"]) == SimulatorConfig.paper(inner_lr=0.01).to_dict()
        assert json.loads(about["tintc.source"])["kind"] == "directory"
        assert about["tintc.max_tokens"] == str(POSITIONS)
        assert json.loads(about["tokenizer.json"])["truncation"] is None

    def test_force(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_text("before")
        assert "--force" in tintc("export", artifact(), "--onnx", tmp_path / "m.onnx").refused(2)
        assert (
            tintc("export", artifact(), "--onnx", tmp_path / "m.onnx", "--force", "--no-check").code
            == 0
        )

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (("--with", "labels"), 2, "--with is labels; expected loss_mask"),
            (("--opset", 9), 2, "opset is 9"),
            (("--dtype", "bfloat16"), 2, "float32, float64 or float16"),
            (("--dtype", "int8"), 2, "dtype is 'int8'"),
            (("--with", "attention_mask", "--with", "pair_mask"), 2, "two shapes of one input"),
            (("--chunk", 6), 2, "chunk is of a stream; expected stream beside it"),
            (("--keys", "cache"), 2, "keys is of a stream"),
            (("--stream", "--with", "losses"), 2, "inputs and outputs of its own; got losses"),
            (("--stream", "--chunk", 0), 2, "chunk is 0; expected a whole number"),
            (("--stream", "--context", 9999), 2, "make windows of 10127 tokens; this model"),
            (("--stream", "--keys", "kept"), 2, "keys is 'kept'; expected one of recompute"),
        ],
    )
    def test_refused(
        self, options: tuple[Any, ...], code: int, message: str, tmp_path: Path
    ) -> None:
        assert message in tintc(
            "export", artifact(), "--onnx", tmp_path / "m.onnx", *options
        ).refused(code)
        assert not list(tmp_path.iterdir())

    def test_bad_paths(self, tmp_path: Path) -> None:
        assert "ends in .onnx" in tintc("export", artifact(), "--onnx", tmp_path / "m").refused(2)
        assert "is no tintc artifact" in tintc(
            "export", tmp_path, "--onnx", tmp_path / "m.onnx"
        ).refused(1)
        (tmp_path / "file").touch()
        assert "no directory" in tintc(
            "export", artifact(), "--onnx", tmp_path / "file" / "m.onnx"
        ).refused(2)

    def test_disagreement(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr("tintc.compiler.onnx.comparison.TOLERANCE", {torch.float32: 0.0})
        assert "onnxruntime disagrees" in tintc(
            "export", artifact(), "--onnx", tmp_path / "m.onnx"
        ).refused(5)
        assert not list(tmp_path.iterdir())


class TestRun:
    @pytest.mark.parametrize(
        "options",
        [
            (),
            ("--train-fraction", 0.2),
            ("--train-fraction", 0),
            ("--inner-lr", 0.001),
            ("--tokens", 9),
        ],
    )
    def test_same_as_the_artifact(self, options: tuple[Any, ...]) -> None:
        found = tintc("run", model(), "--text", TEXT, "--json", *options).document
        expected = tintc("run", artifact(), "--text", TEXT, "--json", *options).document
        assert list(found) == list(expected)
        assert found.pop("rule") == expected.pop("rule") == {}
        assert found == pytest.approx(expected, rel=1e-4)

    def test_all_of_it_may_be_trained_where_something_is_generated(self) -> None:
        options = ("--text", TEXT, "--train-fraction", 1, "--generate", 2, "--json")
        found, expected = (tintc("run", path, *options).document for path in (model(), artifact()))
        assert (found.pop("inner_lr"), expected.pop("inner_lr")) == pytest.approx((0.01, 0.01))
        assert found.items() <= expected.items()  # torch's also tells times
        assert (found["predicted_tokens"], found["perplexity_after"]) == (0, None)

    def test_generate(self) -> None:
        found, expected = (
            tintc("run", path, "--text", TEXT, "--generate", 3) for path in (model(), artifact())
        )
        assert (found.code, found.err) == (0, "")
        assert found.out.splitlines()[-1] == expected.out.splitlines()[-1]

    def test_generate_to_the_last_position(self) -> None:
        long = " ".join([TEXT] * 10)
        done = tintc(
            "run", model(), "--text", long, "--tokens", POSITIONS - 1, "--generate", 5, "--json"
        )
        assert done.code == 0
        assert isinstance(done.document["generated"], str)

    @pytest.mark.parametrize(
        "asked",
        [
            ("attention_mask", "loss_mask", "position_ids", "losses"),
            ("pair_mask", "initial_logits"),
        ],
    )
    def test_further_inputs_are_filled_in(self, asked: tuple[str, ...], tmp_path: Path) -> None:
        further = [part for name in asked for part in ("--with", name)]
        assert (
            tintc("export", artifact(), "--onnx", tmp_path / "m.onnx", "--no-check", *further).code
            == 0
        )
        found, expected = (
            tintc("run", path, "--text", TEXT, "--json").document
            for path in (tmp_path / "m.onnx", model())
        )
        assert found.pop("rule") == expected.pop("rule") == {}
        assert found == pytest.approx(expected, rel=1e-4)

    def test_without_torch(self) -> None:
        code = f"""
import sys
from tintc.cli import app
app(["run", {str(model())!r}, "--text", {TEXT!r}, "--generate", "1", "--json"])
heavy = {{"torch", "transformers", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
"""
        done = process(code=code)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["tokens"] > 9

    def test_refused(self, tmp_path: Path) -> None:
        text = ("--text", TEXT)
        assert "does not exist" in tintc("run", tmp_path / "m.onnx", *text).refused(1)
        (tmp_path / "m.onnx").write_text("no model")
        assert "cannot be read as an ONNX model" in tintc(
            "run", tmp_path / "m.onnx", *text
        ).refused(1)
        for option in (("--device", "cpu"), ("--dtype", "float64")):
            assert "neither --device nor --dtype" in tintc("run", model(), *text, *option).refused(
                2
            )
        assert "pass --tokens" in tintc("run", model(), "--text", " ".join([TEXT] * 10)).refused(2)
        assert "expected 0 or more" in tintc("run", model(), *text, "--train-fraction", 1).refused(
            2
        )
        assert "nothing is left" in tintc("run", model(), *text, "--train-fraction", 0.999).refused(
            2
        )
        assert "pass a smaller --inner-lr" in tintc(
            "run", model(), *text, "--inner-lr", 1e30
        ).refused(5)

    def test_another_s_model(self, tmp_path: Path) -> None:
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [value], [out])
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
            tmp_path / "m.onnx",
        )
        assert "is no simulator" in tintc("run", tmp_path / "m.onnx", "--text", TEXT).refused(1)

    def test_no_tokenizer_or_no_logits(self, tmp_path: Path) -> None:
        simulator = compile_model(nano(), SimulatorConfig.paper())
        export_onnx(simulator.float(), tmp_path / "nano.onnx", check=False)
        assert "holds no tokenizer" in tintc("run", tmp_path / "nano.onnx", "--text", TEXT).refused(
            2
        )
        export_onnx(simulator, tmp_path / "losses.onnx", outputs=("losses",), check=False)
        assert "no output logits" in tintc("run", tmp_path / "losses.onnx", "--text", TEXT).refused(
            2
        )


class TestExample:
    def test_as_documented(self, tmp_path: Path) -> None:
        """No more than onnxruntime, tokenizers and numpy, and the figures of `tintc run`."""
        (tmp_path / "text").write_text(TEXT)
        script = ROOT / "examples" / "onnx_fine_tune.py"
        assert len(script.read_text().splitlines()) <= 40
        command = [sys.executable, str(script), str(model()), str(tmp_path / "text")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        found = dict(re.findall(r"perplexity (\w+) +([\d.]+)", done.stdout))
        expected = tintc("run", model(), "--text", TEXT, "--json").document
        for when in ("before", "after"):
            assert float(found[when]) == pytest.approx(expected[f"perplexity_{when}"], rel=1e-4)

    def test_imports(self) -> None:
        modules = set(runpy.run_path(str(ROOT / "examples" / "onnx_fine_tune.py")))
        assert not {"torch", "transformers", "tintc"} & modules
