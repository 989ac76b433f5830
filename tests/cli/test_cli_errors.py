"""Whatever goes wrong: one clear line on standard error, nothing on standard output, the right exit
code.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import tintc as package
from tests.support.artifacts import (
    POSITIONS,
    TEXT,
    artifact,
    copy_of,
    edit_json,
    seal,
    source_directory,
)
from tests.support.command import process, tintc
from tests.support.models import opt
from tintc.compiler import artifact_writer
from tintc.compiler.frontend import hub


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tiny model's directory, which the test may change."""
    return copy_of(source_directory(), tmp_path / "model")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "sim"


def refused_compile(code: int, source: object, target: Path, *options: object) -> str:
    """The message of a refused compile that leaves nothing behind."""
    before = sorted(target.parent.iterdir())
    message = tintc("compile", source, "-o", target, *options).refused(code)
    assert sorted(target.parent.iterdir()) == before
    return message


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["bogus"], "No such command 'bogus'; `tintc --help`"),
            (["--bogus"], "No such option: --bogus"),
            (["compile"], "Missing argument 'source'; `tintc compile --help`"),
            (["compile", "tiny-opt"], "Missing option '-o' / '--output'"),
            (["compile", "tiny-opt", "-o", "x", "--steps", "two"], "--steps"),
            (["compile", "tiny-opt", "-o", "x", "--step", "2"], "--step"),
            (["compile", "tiny-opt", "gpt2", "-o", "x"], "gpt2"),
            (["run"], "Missing argument 'DIR'"),
            (["run", "x", "--generate", "-1"], "--generate"),
            (["run", "x", "--tokens", "1"], "--tokens"),
            (["verify", "x", "--tokens", "1"], "--tokens"),
            (
                ["compile", "tiny-opt", "-o", "x", "--steps", "0"],
                "steps is 0; expected a whole number of at least 1",
            ),
            (["compile", "tiny-opt", "-o", "x", "--layers", "0"], "layers is 0"),
            (
                ["compile", "tiny-opt", "-o", "x", "--inner-lr", "nan"],
                "inner_lr is nan; expected a finite number",
            ),
            (
                ["compile", "tiny-opt", "-o", "x", "--finite-difference-scale", "0"],
                "finite_difference_scale is 0.0",
            ),
            (
                ["compile", "tiny-opt", "-o", "x", "--preset", "fast"],
                "preset is 'fast'; expected one of paper, exact",
            ),
            (
                ["compile", "tiny-opt", "-o", "x", "--dtype", "int8"],
                "dtype is 'int8'; expected one of float32",
            ),
            (
                ["compile", "tiny-opt", "-o", "x", "--loss-gradient", "mse"],
                "loss_gradient is 'mse'; expected one of softmax",
            ),
            (
                ["compile", "tiny-opt", "-o", "x", "--config", "absent.json"],
                "cannot read the config absent.json",
            ),
            (["inspect", "x", "--stage", "final"], "stage is 'final'; expected one of captured"),
            (["inspect", "x", "--format", "svg"], "format is 'svg'; expected one of table"),
            (
                ["inspect", "x", "--slots", "--format", "dot"],
                "--slots has the formats table and json",
            ),
            (
                ["inspect", "x", "--node", "n", "--format", "code"],
                "--node has the formats table and json",
            ),
            (["inspect", "x", "--slots", "--node", "n"], "without --stage, --node and --params"),
            (["inspect", "x", "--json", "--format", "dot"], "exclude each other"),
            (["run", "x"], "pass one of --text TEXT, --file FILE, or -"),
            (["run", "x", "--text", "a", "--file", "b"], "pass one of"),
            (["run", "x", "-", "--text", "a"], "pass one of"),
            (["run", "x", "some text"], "unexpected argument 'some text'"),
            (["run", "x", "--text", "a", "--train-fraction", "1"], "or 1 with --generate N"),
            (["run", "x", "--text", "a", "--train-fraction", "-0.1"], "train-fraction is -0.1"),
            (["run", "x", "--text", "a", "--train-fraction", "nan"], "train-fraction is nan"),
            (["run", "x", "--text", "a", "--inner-lr", "inf"], "inner-lr is inf"),
            (
                ["run", "x", "--text", "a", "--device", "tpu9"],
                "device is 'tpu9'; expected cpu, cuda or cuda:N",
            ),
            (
                ["run", "x", "--text", "a", "--device", "meta"],
                "device is 'meta'; expected cpu, cuda or cuda:N",
            ),
            (
                ["run", "x", "--text", "a", "--device", "cuda:99"],
                "device is cuda:99; this machine has",
            ),
            (["run", "x", "--text", "a", "--dtype", "int"], "dtype is 'int'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_refused_with_2(
        self, arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert words in tintc(*arguments).refused(2)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{", "cannot read the config"),
            ("[1]", "holds a list; expected a JSON object"),
            ('{"speed": 9}', "unknown config field speed; the fields are steps"),
            ('{"steps": "many"}', "steps is 'many'"),
            ('{"preset": 3}', "preset is 3"),
            ('{"inner_lr": NaN}', "inner_lr is nan"),
        ],
    )
    def test_config_file(self, text: str, words: str, target: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(text)
        assert words in refused_compile(
            2, source_directory(), target, "--config", tmp_path / "config.json"
        )

    def test_more_layers_than_there_are(self, target: Path) -> None:
        assert "layers is 3; expected 1 to 2" in refused_compile(
            2, source_directory(), target, "--layers", 3
        )

    def test_layout_that_cannot_be(self, target: Path) -> None:
        assert "sim_hidden is 7; expected at least" in refused_compile(
            2, source_directory(), target, "--sim-hidden", 7
        )

    def test_unknown_node(self) -> None:
        message = tintc("inspect", artifact(), "--node", "fc1").refused(2)
        assert "no node fc1 in the lowered graph; names that contain it: " in message
        message = tintc("inspect", artifact(), "--node", "zzz", "--stage", "canonical").refused(2)
        assert "no node zzz in the canonical graph; tintc inspect" in message


class TestModels:
    def test_unknown_names(self, target: Path) -> None:
        assert "there is no shape 'opt-1'; the shapes are opt-125m" in refused_compile(
            1, "shape:opt-1", target
        )
        assert "./absent does not exist" in refused_compile(1, "./absent", target)
        assert "is neither a directory nor a hub id" in refused_compile(1, "no such model", target)

    def test_no_network(
        self, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*_: Any, **__: Any) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        for options in ((), ("--offline",)):
            message = refused_compile(
                1, "facebook/opt-125m", target, "--cache-dir", tmp_path / "cache", *options
            )
            assert "run `hf download facebook/opt-125m`" in message
            assert ("offline mode" if options else "no route to host") in message

    def test_not_a_causal_model(self, target: Path, tmp_path: Path) -> None:
        config = transformers.T5Config(
            vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
        assert "is no causal language model" in refused_compile(3, tmp_path / "t5", target)

    def test_the_first_operator_that_nothing_takes_is_named(
        self, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """OPT with activations that not even islands take; where the model lies is a detail of
        transformers.
        """
        from tintc.compiler import driver
        from tintc.compiler.frontend import sources

        class Strange(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.erfinv(torch.i0(x))

        model = opt(dtype=torch.float32)
        for layer in model.model.decoder.layers:
            layer.activation_fn = Strange()
        description = sources.SourceDescription("directory", "strange")
        monkeypatch.setattr(
            driver, "load_source", lambda *_, **__: sources.Source(model, None, description)
        )
        message = refused_compile(3, "strange", target)
        assert "aten.i0.default" in message
        assert "layers.0.activation_fn" in message
        assert "test_cli_errors.py:" in message

    def test_nan_weights(self, source: Path, target: Path) -> None:
        weights = load_file(source / "model.safetensors")
        name = "model.decoder.layers.0.fc1.weight"
        weights[name][0, 0] = float("nan")
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        assert f"NaN or infinite weights in {name}" in refused_compile(1, source, target)

    def test_truncated_weights(self, source: Path, target: Path) -> None:
        data = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(data[: len(data) // 2])
        assert "model.safetensors is truncated or damaged" in refused_compile(1, source, target)

    def test_does_not_fit_in_memory(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        free = psutil.virtual_memory()._replace(available=1000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        assert "memory are free; choose a smaller model" in refused_compile(
            4, source_directory(), target
        )

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ],
    )
    def test_memory_that_runs_out(
        self, error: Exception, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tintc.compiler import driver

        def run_out(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(driver, "capture", run_out)
        assert "out of memory; use a smaller model" in refused_compile(
            4, source_directory(), target
        )

    def test_self_check(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tintc.compiler import driver

        capture = driver.capture

        def tampered(model: nn.Module) -> Any:
            captured = capture(model)
            captured.tensors["model.decoder.layers.0.fc1.bias"] = (
                captured.tensors["model.decoder.layers.0.fc1.bias"] + 1
            )
            return captured

        monkeypatch.setattr(driver, "capture", tampered)
        assert "differs from the model's" in refused_compile(5, source_directory(), target)


class TestOutput:
    def test_directory_that_exists(self, tmp_path: Path) -> None:
        folder = copy_of(artifact(), tmp_path / "sim")
        before = (folder / "manifest.json").read_bytes()
        assert "exists; pass --force to replace it" in refused_compile(
            2, source_directory(), folder
        )
        assert (folder / "manifest.json").read_bytes() == before

    def test_it_is_refused_before_anything_is_compiled(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tintc.compiler import driver

        monkeypatch.setattr(driver, "compile", lambda *_, **__: pytest.fail("compiled"))
        refused_compile(2, source_directory(), tmp_path)
        (tmp_path / "file").write_text("mine")
        assert "is a file" in tintc(
            "compile", source_directory(), "-o", tmp_path / "file" / "sim"
        ).refused(2)
        assert "is a file" in refused_compile(2, source_directory(), tmp_path / "file", "--force")

    def test_force_spares_what_is_no_artifact(self, tmp_path: Path) -> None:
        (tmp_path / "sim").mkdir()
        (tmp_path / "sim" / "precious").write_text("mine")
        assert "tintc does not replace what it did not write" in refused_compile(
            2, source_directory(), tmp_path / "sim", "--force"
        )
        assert (tmp_path / "sim" / "precious").read_text() == "mine"

    def test_full_disk(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(artifact_writer, "write_weights", full)
        assert "No space left on device; nothing was left behind" in refused_compile(
            1, source_directory(), target
        )


COMMANDS = [["inspect"], ["inspect", "--stage", "lowered"], ["run", "--text", TEXT], ["verify"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
class TestArtifacts:
    def test_altered(self, command: list[str], tmp_path: Path) -> None:
        folder = copy_of(artifact(), tmp_path / "sim")
        with (folder / "graph.json").open("ab") as file:
            file.write(b" ")
        message = tintc(command[0], folder, *command[1:]).refused(1)
        assert "graph.json is altered or truncated: its sha256 is" in message

    def test_truncated(self, command: list[str], tmp_path: Path) -> None:
        folder = copy_of(artifact(), tmp_path / "sim")
        data = (folder / "weights.safetensors").read_bytes()
        (folder / "weights.safetensors").write_bytes(data[:-9])
        assert "weights.safetensors is altered or truncated: its sha256 is" in tintc(
            command[0], folder, *command[1:]
        ).refused(1)

    def test_format_version(self, command: list[str], tmp_path: Path) -> None:
        folder = seal(
            copy_of(artifact(), tmp_path / "sim"),
            lambda manifest: manifest.update(format_version=99),
        )
        assert "has format version 99; this tintc reads version 6" in tintc(
            command[0], folder, *command[1:]
        ).refused(1)

    def test_no_artifact(self, command: list[str], tmp_path: Path) -> None:
        if command[0] == "verify":  # which takes sources as well
            assert "has no config.json" in tintc("verify", tmp_path).refused(1)
            return
        for path in (tmp_path, tmp_path / "absent", source_directory()):
            assert "is no tintc artifact: it has no manifest.json" in tintc(
                command[0], path, *command[1:]
            ).refused(1)


class TestRun:
    @pytest.mark.parametrize(
        ("text", "words"), [("", "the text is empty"), (" \n\t", "the text is empty")]
    )
    def test_no_text(self, text: str, words: str, tmp_path: Path) -> None:
        (tmp_path / "text").write_text(text)
        assert words in tintc("run", artifact(), "--text", text).refused(2)
        assert words in tintc("run", artifact(), "--file", tmp_path / "text").refused(2)
        assert words in tintc("run", artifact(), "-", stdin=text.encode()).refused(2)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        assert "absent: No such file or directory" in tintc(
            "run", artifact(), "--file", tmp_path / "absent"
        ).refused(2)
        assert "holds no *.txt" in tintc("run", artifact(), "--file", tmp_path).refused(2)

    def test_what_is_no_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_bytes(b"caf\xe9 au lait")
        assert "it is not UTF-8 text" in tintc(
            "run", artifact(), "--file", tmp_path / "text"
        ).refused(2)
        assert "standard input: it is not UTF-8 text" in tintc(
            "run", artifact(), "-", stdin=b"caf\xe9 au lait"
        ).refused(2)
        assert "--text: it is not UTF-8 text" in tintc(
            "run", artifact(), "--text", "caf\udce9 au lait"
        ).refused(2)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("docs.jsonl", '{"text": "The sea."}\n{"text": "The hills."}\n'),
            ("docs.jsonl", '["The sea."]\n'),
            ("docs.txt", '\n{"text": "The sea."}\n{"text": "The hills."}\n'),
            ("docs.txt", '{"text": "The sea."}'),
        ],
    )
    def test_json_lines_are_no_plain_text(self, name: str, text: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(text)
        for given in (("--file", tmp_path / name), ("-",)):
            says = name.endswith("l") if given != ("-",) else not text.strip().startswith("{")
            if says:
                continue  # documents, or nothing but its name says what it is
            message = tintc("run", artifact(), *given, stdin=text.encode()).refused(2)
            assert "holds JSON objects" in message
            assert "tintc eval lm --data" in message

    def test_text_that_looks_like_json_is_taken_where_it_is_meant(self, tmp_path: Path) -> None:
        assert tintc("run", artifact(), "--text", '{"text": "The sea and the hills."}').code == 0
        (tmp_path / "set.txt").write_text("{ the sea } and the hills of the town")
        assert tintc("run", artifact(), "--file", tmp_path / "set.txt").code == 0

    @pytest.mark.parametrize(
        "command",
        [
            ("run", "x", "--file", "a", "--file", "b"),
            ("run", "x", "--text", "a", "--text", "b"),
            ("eval", "lm", "x", "--data", "a", "--data", "b"),
            ("ablate", "x", "--data", "a", "--choose", "a", "--choose", "b"),
        ],
    )
    def test_of_several_texts_none_is_left_out(self, command: tuple[str, ...]) -> None:
        message = tintc(*command).refused(2)
        assert f"{command[-2]} is given more than once; expected one" in message

    def test_longer_than_the_positions(self) -> None:
        message = tintc("run", artifact(), "--text", " ".join([TEXT] * 20)).refused(2)
        assert f"this simulator takes {POSITIONS}: pass --tokens {POSITIONS} to cut it" in message

    def test_nothing_to_predict(self) -> None:
        assert "nothing is left to predict" in tintc(
            "run", artifact(), "--text", "the sea", "--train-fraction", 0.99
        ).refused(2)

    def test_training_that_diverges(self) -> None:
        for more in ((), ("--json",)):
            message = tintc("run", artifact(), "--text", TEXT, "--inner-lr", 1e38, *more).refused(5)
            assert "pass a smaller --inner-lr" in message

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        folder = copy_of(artifact(), tmp_path / "sim")
        shutil.rmtree(folder / "tokenizer")
        assert "this artifact has no tokenizer" in tintc(
            "run", seal(folder), "--text", TEXT
        ).refused(2)

    def test_token_ids_beyond_the_vocabulary(self, tmp_path: Path) -> None:
        model = copy_of(source_directory(), tmp_path / "model")
        small = opt(vocab=9, hidden=12, heads=3, ffn=20, layers=1, positions=64)
        small.float().save_pretrained(model)
        folder = package.save(package.compile(str(model)), tmp_path / "sim")
        assert "this model's tokens are 0 to 8" in tintc("run", folder, "--text", TEXT).refused(2)


class TestVerify:
    @pytest.fixture
    def wrong(self, tmp_path: Path) -> Path:
        """An exact artifact whose backward pass has another scale of attention than its forward
        pass; all else fits.
        """
        folder = copy_of(artifact("exact"), tmp_path / "sim")

        def rescale(graph: Any) -> None:
            for record in graph["lowered"]:
                if record["operator"] == "tint.attention_backward_full":
                    record["args"][-2] *= 2

        edit_json(folder / "graph.json", rescale)
        return seal(folder)

    def test_disagreement(self, wrong: Path) -> None:
        done = tintc("verify", wrong, "--tokens", 20)
        assert done.code == 5
        assert "DISAGREES with autograd" in done.out
        assert done.err.startswith(
            f"error: {wrong} disagrees with autograd through OPTForCausalLM: initial logits differ "
            "by"
        )
        assert done.err.count("\n") == 1

    def test_disagreement_as_json(self, wrong: Path) -> None:
        done = tintc("verify", wrong, "--tokens", 20, "--json")
        assert done.code == 5
        assert done.document["agrees"] is False
        assert done.err.count("\n") == 1

    def test_too_long(self) -> None:
        assert f"expected 2 to {POSITIONS}" in tintc(
            "verify", artifact(), "--tokens", POSITIONS + 1
        ).refused(2)


class TestProcesses:
    """What only a process of its own shows: streams, exit codes, tracebacks."""

    def test_success(self, tmp_path: Path) -> None:
        copied = copy_of(artifact(), tmp_path / "sim")
        done = process("inspect", copied, "--format", "json")
        assert done.returncode == 0
        assert done.stderr == ""
        assert json.loads(done.stdout)["blocks"] == 2

    @pytest.mark.slow
    def test_success_of_compile(self, tmp_path: Path) -> None:
        done = process("compile", source_directory(), "-o", tmp_path / "sim", "--json")
        assert done.returncode == 0
        assert done.stderr == ""
        assert json.loads(done.stdout)["blocks"] == 2

    def test_failure(self) -> None:
        done = process("inspect", "absent")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: absent is no tintc artifact")
        assert done.stderr.count("\n") == 1

    @pytest.mark.slow
    def test_debug(self) -> None:
        done = process("inspect", "absent", "--debug")
        assert (done.returncode, done.stdout) == (1, "")
        assert "Traceback (most recent call last)" in done.stderr
        assert "ArtifactError: absent is no tintc artifact" in done.stderr

    def test_unexpected_errors_are_one_line_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tintc.commands import env

        def fail(**_: Any) -> None:
            raise RuntimeError("two\nlines")

        monkeypatch.setattr(env, "run", fail)
        done = tintc("env")
        assert (done.code, done.out) == (1, "")
        assert (
            done.err
            == "error: unexpected RuntimeError: two lines (--debug shows where; please report it)\n"
        )

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tintc.commands import env

        def interrupt(**_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(env, "run", interrupt)
        assert tintc("env").code == 130
