"""What lies beside a model's weights: other weights, an adapter, a tokenizer that is none or is
code.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tintc as package
from tests.support.artifacts import TEXT, copy_of, edit_json, source_directory
from tests.support.command import process, tintc
from tests.support.hub import copied, point_at, serving
from tests.support.refusals import refusal
from tintc import save
from tintc.compiler.frontend.checkpoint import Checkpoint
from tintc.compiler.frontend.sources import load_source, load_without_weights

WEIGHTS, OTHER = "model.safetensors", "other.safetensors"
NORM = "model.decoder.final_layer_norm.bias"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return copy_of(source_directory(), tmp_path / "model")


def with_other_weights(directory: Path, name: str = OTHER) -> Path:
    """Beside the weights a second file of them, of other numbers, which the config names."""
    weights = load_file(directory / WEIGHTS)
    weights[NORM] = weights[NORM] + 1
    (directory / name).parent.mkdir(exist_ok=True)
    save_file(weights, directory / name, metadata={"format": "pt"})
    edit_json(directory / "config.json", lambda config: config.update(transformers_weights=name))
    return directory / name


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class TestChosenWeights:
    @pytest.mark.parametrize("name", [OTHER, "sub/other.safetensors"])
    def test_digest_and_numbers_are_of_one_file(self, directory: Path, name: str) -> None:
        file = with_other_weights(directory, name)
        source = load_source(directory)
        torch.testing.assert_close(source.model.state_dict()[NORM], load_file(file)[NORM])
        assert source.description.sha256 == sha256(file)

    def test_damage_of_that_file_is_found_and_of_no_other(self, directory: Path) -> None:
        file = with_other_weights(directory)
        (directory / WEIGHTS).write_bytes(b"not read")
        load_source(directory)
        file.write_bytes(file.read_bytes()[:-1])
        assert f"{OTHER} is truncated or damaged" in refusal(directory)
        file.unlink()
        assert f"expected {OTHER}, which its config.json names" in refusal(directory)

    @pytest.mark.parametrize("name", ["../other.safetensors", "/x.safetensors", "other.bin", 3])
    def test_names_that_make_no_sense(self, directory: Path, name: object) -> None:
        edit_json(directory / "config.json", lambda c: c.update(transformers_weights=name))
        assert f"transformers_weights in its config.json is '{name}'" in refusal(directory)

    @pytest.mark.parametrize("sharded", [False, True])
    def test_from_the_hub(
        self, tmp_path: Path, sharded: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with serving(tmp_path / "hub") as hub:
            model = copied(source_directory(), hub.model("owner/two"))
            file = with_other_weights(model)
            index = "sub/other.safetensors.index.json"
            if sharded:
                (model / "sub").mkdir()
                weight_map = dict.fromkeys(load_file(file), OTHER)
                value = {"metadata": {}, "weight_map": weight_map}
                (model / index).write_text(json.dumps(value))
                edit_json(model / "config.json", lambda c: c.update(transformers_weights=index))
            point_at(hub.url, monkeypatch)
            source = load_source("owner/two", cache_dir=str(tmp_path / "cache"))
            assert source.description.sha256 == sha256(file)
            assert OTHER in hub.fetched() and WEIGHTS not in hub.fetched()

    def test_weights_that_transformers_would_prefer_are_not_seen(self, directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        weights[NORM] = weights[NORM] + 1
        save_file(weights, directory / "shard-00000-model-00001-of-00001.safetensors")
        source = load_source(directory)
        expected = load_file(directory / WEIGHTS)
        torch.testing.assert_close(source.model.state_dict()[NORM], expected[NORM])
        assert source.description.sha256 == sha256(directory / WEIGHTS)


class TestAdapter:
    @pytest.fixture
    def adapted(self, directory: Path) -> Path:
        config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "someone/else"}
        (directory / "adapter_config.json").write_text(json.dumps(config))
        save_file({"a": torch.ones(1)}, directory / "adapter_model.safetensors")
        return directory

    @pytest.mark.parametrize("installed", [False, True])
    def test_not_applied_and_said_so(
        self,
        adapted: Path,
        installed: bool,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """With peft, transformers would put the adapter into the model."""
        for module in (transformers.integrations.peft, transformers.models.auto.auto_factory):
            monkeypatch.setattr(module, "is_peft_available", lambda: installed)
        with caplog.at_level(logging.WARNING, logger="tintc"):
            source = load_source(adapted)
        plain = load_source(source_directory()).model.state_dict()
        torch.testing.assert_close(source.model.state_dict(), plain, rtol=0, atol=0)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1
        assert "(adapter_config.json) is not applied" in lines[0]
        assert "merge_and_unload" in lines[0] and "save_pretrained" in lines[0]


class TestTokenizer:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"tokenizer_class": "GPT2Tokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}],
        ids=str,
    )
    def test_settings_without_a_vocabulary(
        self, directory: Path, settings: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        with caplog.at_level(logging.WARNING, logger="tintc"):
            assert load_source(directory).tokenizer is None
        assert "has a tokenizer_config.json but no vocabulary" in caplog.text

    def test_a_tokenizer_of_bytes_needs_no_vocabulary(self, directory: Path) -> None:
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
        tokenizer = load_source(directory).tokenizer
        assert tokenizer is not None
        assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [100, 101]


class TestTokenizerOfItsOwnCode:
    FAST = (
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    # Does what the tokenizer inside does not.
    MORE = FAST + (
        "    def __call__(self, text, **more):\n"
        "        return super().__call__(text.upper(), **more)\n"
    )

    @pytest.fixture
    def modules(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = str(tmp_path / "modules")
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        monkeypatch.syspath_prepend(folder)
        return

    def with_code(self, directory: Path, code: str) -> Path:
        (directory / "its_code.py").write_text(code)
        settings = {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "its_code.OwnTokenizer"]},
        }
        edit_json(directory / "tokenizer_config.json", lambda config: config.update(settings))
        return directory

    def compiled(self, directory: Path, target: Path) -> Any:
        simulator = package.compile(str(directory), trust_remote_code=True, check="none")
        assert type(simulator.tokenizer).__name__ == "OwnTokenizer"
        save(simulator, target)
        return simulator.tokenizer

    @pytest.mark.usefixtures("modules")
    def test_runs_without_the_code(self, directory: Path, tmp_path: Path) -> None:
        own = self.compiled(self.with_code(directory, self.FAST), tmp_path / "sim")
        found = package.load(tmp_path / "sim").tokenizer
        assert found(TEXT)["input_ids"] == own(TEXT)["input_ids"]
        assert found.special_tokens_map == own.special_tokens_map
        assert not list((tmp_path / "sim").rglob("*.py"))
        assert tintc("run", tmp_path / "sim", "--text", TEXT, "--json").document["tokens"] > 2

    @pytest.mark.usefixtures("modules")
    def test_left_out_where_it_cannot(
        self, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="tintc"):
            self.compiled(self.with_code(directory, self.MORE), tmp_path / "sim")
        assert "the tokenizer OwnTokenizer is Python code" in caplog.text
        assert package.load(tmp_path / "sim").tokenizer is None
        assert "no tokenizer" in tintc("run", tmp_path / "sim", "--text", TEXT).refused(2)


# As much of the package `kernels` as transformers imports; fetching one leaves a marker.
KERNELS = """
import os, pathlib

def get_kernel(*_, **__):
    pathlib.Path(os.environ["MARKER"]).write_text("fetched and run")
    raise FileNotFoundError("no kernel")

class Anything:
    def __init__(self, *_, **__): ...
    def __call__(self, *_, **__): return lambda wrapped: wrapped
    def __getattr__(self, name): return Anything()

def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything()
"""


class TestImplementations:
    """Nothing in a config chooses code."""

    @pytest.mark.parametrize(
        "entries",
        [
            {"attn_implementation": "flash_attention_2"},
            {"_attn_implementation": "flash_attention_2"},
            {"attn_implementation": "someone/some-kernel"},
            {"_attn_implementation": "someone/some-kernel", "output_attentions": True},
            {"_attn_implementation_internal": "someone/some-kernel"},
            {"attn_implementation": {"": "someone/some-kernel"}},
            {"attn_implementation": 3, "experts_implementation": "sonicmoe"},
            {"attn_implementation": "eager"},
        ],
        ids=str,
    )
    def test_ours_whatever_a_config_says(
        self, directory: Path, entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fetch(*_: Any, **__: Any) -> None:
            pytest.fail("a kernel was fetched")

        kernels = transformers.integrations.hub_kernels
        monkeypatch.setattr(kernels, "get_kernel", fetch)
        for module in (kernels, transformers.modeling_utils):
            monkeypatch.setattr(module, "is_kernels_available", lambda: True)
        edit_json(directory / "config.json", lambda config: config.update(entries))
        source = load_source(directory)
        assert source.model.config._attn_implementation == "sdpa"
        assert "someone" not in json.dumps(source.description.config)
        assert load_without_weights(str(directory)).model.config._attn_implementation == "sdpa"

    def test_a_model_without_sdpa(self, tmp_path: Path) -> None:
        config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
        transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "model")
        entries = {"_attn_implementation": "someone/some-kernel"}
        edit_json(tmp_path / "model" / "config.json", lambda config: config.update(entries))
        assert load_source(tmp_path / "model").model.config._attn_implementation == "eager"

    def test_parts_of_a_config(self, tmp_path: Path) -> None:
        parts = {"text_config": {"attn_implementation": "someone/some-kernel", "hidden_size": 16}}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", **parts}))
        config = Checkpoint("it", torch.float32, False, True).read_config(tmp_path)
        assert config.text_config.hidden_size == 16
        assert config.text_config._attn_implementation is None

    @pytest.mark.slow
    def test_no_kernel_is_fetched_where_the_package_is_installed(
        self, directory: Path, tmp_path: Path
    ) -> None:
        installed = tmp_path / "installed"
        (installed / "kernels" / "layer").mkdir(parents=True)
        (installed / "kernels" / "__init__.py").write_text(KERNELS)
        (installed / "kernels" / "layer" / "__init__.py").write_text("")
        (installed / "kernels" / "layer" / "mode.py").write_text("class Mode: ...\n")
        version = transformers.utils.import_utils.KERNELS_MIN_VERSION
        (installed / f"kernels-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
        (installed / f"kernels-{version}.dist-info" / "METADATA").write_text(metadata)
        entries = {"attn_implementation": "someone/some-kernel"}
        edit_json(directory / "config.json", lambda config: config.update(entries))
        code = (
            f"import sys; sys.path.insert(0, {str(installed)!r})\n"
            "from transformers.utils import is_kernels_available\n"
            "assert is_kernels_available()\n"
            f"import os; os.environ['MARKER'] = {str(tmp_path / 'marker')!r}\n"
            f"import tintc; tintc.compile({str(directory)!r}, check='none')\n"
        )
        finished = process(code=code)
        assert finished.returncode == 0, finished.stderr
        assert not (tmp_path / "marker").exists()


class TestFilesThatAreNone:
    """A link to nothing, and what git leaves of a large file where git-lfs is not installed."""

    @pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
    def test_dangling_links(self, directory: Path, file: str) -> None:
        (directory / file).unlink()
        (directory / file).symlink_to("../blobs/nowhere")
        message = refusal(directory)
        assert f"{file} is a link to ../blobs/nowhere, which does not exist" in message
        assert "index" not in message

    def test_a_dangling_gguf_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").symlink_to("elsewhere.gguf")
        message = refusal(tmp_path / "model.gguf")
        assert "is a link to elsewhere.gguf, which does not exist" in message

    @pytest.mark.parametrize(
        "file", [WEIGHTS, "pytorch_model.bin", "config.json", "tokenizer.json", "model.gguf"]
    )
    def test_pointers(self, directory: Path, file: str) -> None:
        if file == "pytorch_model.bin":
            (directory / WEIGHTS).unlink()
        (directory / file).write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456789\n"
        )
        source = directory / file if file.endswith(".gguf") else directory
        message = refusal(source)
        assert f"{file} is a pointer of git-lfs" in message and "run `git lfs pull`" in message

    def test_nothing_else_is_looked_at(self, directory: Path) -> None:
        (directory / "data.json").symlink_to("nowhere")
        (directory / "pytorch_model.bin").symlink_to("nowhere")
        load_source(directory)


def test_compile_without_a_tokenizer_does_not_suggest_to_run(
    directory: Path, tmp_path: Path
) -> None:
    with_one = tintc("compile", directory, "-o", tmp_path / "one").err
    assert f"tintc run {tmp_path / 'one'}" in with_one
    for file in directory.glob("tokenizer*"):
        file.unlink()
    without = tintc("compile", directory, "-o", tmp_path / "none").err
    assert "tintc run" not in without and "token ids" in without
