"""Sources: every kind loads, and every bad one is refused with the right error before anything is
compiled.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from tests.support.artifacts import source_directory
from tests.support.refusals import refusal
from tintc.compiler.frontend import shapes
from tintc.compiler.frontend.kinds import BUNDLED
from tintc.compiler.frontend.model_checks import check_causal, check_finite
from tintc.compiler.frontend.shapes import shape_names
from tintc.compiler.frontend.sources import load_source
from tintc.compiler.frontend.weights import weight_names
from tintc.ir.errors import (
    ArtifactError,
    MemoryLimitError,
    SourceError,
    UnsupportedModelError,
    UsageError,
)

OPT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def tiny_opt_model() -> transformers.OPTForCausalLM:
    return transformers.OPTForCausalLM(transformers.OPTConfig(**OPT))


@pytest.fixture(scope="module")
def opt_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "opt"
    tiny_opt_model().save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "river": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture
def directory(opt_directory: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, to be damaged."""
    return shutil.copytree(opt_directory, tmp_path / "model")


@pytest.fixture
def configure(directory: Path) -> Callable[..., Path]:
    """Changes entries of the saved config.json."""

    def change(**entries: Any) -> Path:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
        return directory

    return change


class TestDirectory:
    def test_weights_tokenizer_and_description(self, opt_directory: Path) -> None:
        source = load_source(str(opt_directory))
        assert isinstance(source.model, transformers.OPTForCausalLM)
        assert not source.model.training
        assert source.model.config._attn_implementation == "sdpa"
        assert {value.dtype for value in source.model.parameters()} == {torch.float32}
        assert source.tokenizer is not None
        assert source.tokenizer("a river")["input_ids"] == [1, 2]
        description = source.description
        assert (description.kind, description.name) == ("directory", opt_directory.name)
        assert description.revision is None
        assert description.seed is None
        assert description.config is not None
        assert description.config["ffn_dim"] == 32
        assert str(opt_directory) not in json.dumps(description.config)

    def test_digest_is_that_of_the_file(self, opt_directory: Path) -> None:
        expected = hashlib.sha256((opt_directory / "model.safetensors").read_bytes()).hexdigest()
        assert load_source(opt_directory).description.sha256 == expected

    def test_without_tokenizer_files_there_is_no_tokenizer(self, directory: Path) -> None:
        for path in directory.glob("tokenizer*"):
            path.unlink()
        assert load_source(directory).tokenizer is None

    def test_dtype(self, opt_directory: Path) -> None:
        assert (
            load_source(opt_directory, dtype=torch.float64).model.lm_head.weight.dtype
            == torch.float64
        )
        assert "int8" in refusal(opt_directory, UsageError, dtype=torch.int8)

    def test_half_precision_weights_load_as_float32(self, tmp_path: Path) -> None:
        tiny_opt_model().half().save_pretrained(tmp_path)
        assert {value.dtype for value in load_source(tmp_path).model.parameters()} == {
            torch.float32
        }

    def test_shards(self, tmp_path: Path) -> None:
        model = tiny_opt_model()
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        source = load_source(tmp_path)
        assert source.description.sha256 is not None
        torch.testing.assert_close(source.model.state_dict(), model.state_dict())
        next(tmp_path.glob("model-00002-*")).unlink()
        assert "lacks model-00002-of-" in refusal(tmp_path)

    def test_home_is_expanded(self, opt_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(opt_directory.parent))
        assert load_source("~/opt").description.kind == "directory"

    def test_the_library_s_settings_stay(
        self, opt_directory: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        logs = transformers.utils.logging
        before = logs.get_verbosity(), logs.is_progress_bar_enabled()
        load_source(opt_directory)
        assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == before
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "../nowhere"])
    def test_path_that_does_not_exist(self, name: str) -> None:
        assert (
            refusal(name)
            == f"{name} does not exist; expected a directory written by save_pretrained or a "
            ".gguf file"
        )

    def test_file(self, opt_directory: Path) -> None:
        assert "is a file" in refusal(opt_directory / "config.json")

    def test_no_config(self, directory: Path) -> None:
        (directory / "config.json").unlink()
        assert "no config.json" in refusal(directory)
        (directory / "manifest.json").write_text("{}")
        assert "has format version None" in refusal(directory, ArtifactError)

    @pytest.mark.parametrize("text", ["{ not json", "[]", "\x00"])
    def test_unreadable_config(self, directory: Path, text: str) -> None:
        (directory / "config.json").write_text(text)
        assert "config.json that" in refusal(directory)

    @pytest.mark.parametrize(
        ("entries", "words"),
        [
            ({"hidden_size": "wide"}, "hidden_size"),
            ({"num_attention_heads": 3}, "divisible"),
            ({"num_hidden_layers": 3}, "lack model.decoder.layers.2"),
            ({"ffn_dim": 48}, "has shape (32,), expected (48,)"),
        ],
    )
    def test_config_that_does_not_fit(
        self, configure: Callable[..., Path], entries: dict[str, Any], words: str
    ) -> None:
        assert words in refusal(configure(**entries))

    def test_weights_left_over_are_named(
        self, configure: Callable[..., Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="tintc"):
            load_source(configure(num_hidden_layers=1))
        assert "model.decoder.layers.1" in caplog.text

    def test_missing_weights(self, directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        assert "has no weights" in refusal(directory)

    @pytest.mark.parametrize("keep", [0, 3, 200, -1])
    def test_truncated_safetensors(self, directory: Path, keep: int) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert "model.safetensors is truncated or damaged" in refusal(directory)

    def test_damaged_index(self, directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text("{}")
        assert "no weight_map" in refusal(directory)

    def test_damaged_tokenizer(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{")
        assert "its tokenizer cannot be loaded" in refusal(directory)

    def test_safetensors_come_before_pickles(self, tmp_path: Path) -> None:
        assert weight_names(tmp_path, ["pytorch_model.bin", "model.safetensors"], "it") == [
            "model.safetensors"
        ]
        assert weight_names(tmp_path, ["tf_model.h5"], "it") == []


class TestPickledWeights:
    def test_plain_tensors_load(self, directory: Path) -> None:
        expected = load_source(directory).model.state_dict()
        (directory / "model.safetensors").unlink()
        torch.save(expected, directory / "pytorch_model.bin")
        torch.testing.assert_close(load_source(directory).model.state_dict(), expected)

    def test_code_in_a_pickle_does_not_run(self, directory: Path, tmp_path: Path) -> None:
        class Touch:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        (directory / "model.safetensors").unlink()
        torch.save({"lm_head.weight": Touch()}, directory / "pytorch_model.bin")
        message = refusal(directory)
        assert "does not unpickle" in message
        assert "weights_only" not in message
        assert not (tmp_path / "ran").exists()


class TestOtherModels:
    @pytest.mark.parametrize(
        "model",
        [
            pytest.param(
                lambda: transformers.T5Model(
                    transformers.T5Config(
                        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
                    )
                ),
                id="t5",
            ),
            pytest.param(
                lambda: transformers.ViTModel(
                    transformers.ViTConfig(
                        hidden_size=16,
                        num_hidden_layers=1,
                        num_attention_heads=2,
                        intermediate_size=32,
                    )
                ),
                id="vit",
            ),
        ],
    )
    def test_not_a_causal_model(
        self, tmp_path: Path, model: Callable[[], transformers.PreTrainedModel]
    ) -> None:
        model().save_pretrained(tmp_path)
        assert "is no causal language model" in refusal(tmp_path, UnsupportedModelError)

    def test_encoder_that_loads_as_causal_looks_ahead(self, tmp_path: Path) -> None:
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
        assert "looks ahead" in refusal(tmp_path, UnsupportedModelError)

    def test_model_without_sdpa_uses_its_own_attention(self, tmp_path: Path) -> None:
        config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
        assert not transformers.BloomForCausalLM._supports_sdpa
        transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
        assert load_source(tmp_path).model.config._attn_implementation == "eager"

    def test_unknown_model_type(self, configure: Callable[..., Path]) -> None:
        assert "'zzz'" in refusal(configure(model_type="zzz"), UnsupportedModelError)

    def test_quantized_weights(self, configure: Callable[..., Path]) -> None:
        assert "quantized" in refusal(
            configure(quantization_config={"quant_method": "gptq", "bits": 4}),
            UnsupportedModelError,
        )


class TestCodeOfItsOwn:
    @pytest.fixture
    def directory_with_code(
        self, configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Path:
        monkeypatch.setattr(
            transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
        )
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        code = {
            "AutoConfig": "its_code.OwnConfig",
            "AutoModelForCausalLM": "its_code.OwnForCausalLM",
        }
        directory = configure(model_type="own", auto_map=code)
        (directory / "its_code.py").write_text(
            "from transformers import OPTConfig, OPTForCausalLM\n"
            "class OwnConfig(OPTConfig):\n    model_type = 'own'\n"
            "class OwnForCausalLM(OPTForCausalLM):\n    config_class = OwnConfig\n"
        )
        return directory

    def test_refused_by_default(self, directory_with_code: Path, tmp_path: Path) -> None:
        assert "pass trust_remote_code=True" in refusal(directory_with_code)
        assert not (tmp_path / "modules").exists()

    def test_runs_when_trusted(self, directory_with_code: Path) -> None:
        source = load_source(directory_with_code, trust_remote_code=True)
        assert type(source.model).__name__ == "OwnForCausalLM"

    def test_not_needed_where_transformers_knows_the_model(
        self, configure: Callable[..., Path]
    ) -> None:
        directory = configure(
            auto_map={"AutoConfig": "its_code.C", "AutoModelForCausalLM": "its_code.M"}
        )
        assert isinstance(load_source(directory).model, transformers.OPTForCausalLM)


class TestShape:
    @pytest.fixture
    def small_shape(self, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setattr(shapes, "_shapes", lambda: {"small": {"model_type": "opt", **OPT}})
        return "shape:small"

    def test_seeded_weights(self, small_shape: str) -> None:
        state = torch.get_rng_state()
        first = load_source(small_shape, seed=1)
        assert torch.equal(state, torch.get_rng_state())
        assert not first.model.training
        assert first.tokenizer is None
        assert (first.description.kind, first.description.name, first.description.seed) == (
            "shape",
            small_shape,
            1,
        )
        assert first.description.sha256 is None
        torch.rand(3)
        again, other = load_source(small_shape, seed=1), load_source(small_shape, seed=2)
        torch.testing.assert_close(
            again.model.state_dict(), first.model.state_dict(), rtol=0, atol=0
        )
        assert not torch.equal(again.model.lm_head.weight, other.model.lm_head.weight)

    # Parameters as published (millions for OPT: Zhang et al. 2022, table 1, rounded there).
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("opt-125m", 125_239_296),
            ("opt-350m", 331_196_416),
            ("opt-1.3b", 1_315_758_080),
            ("opt-2.7b", 2_651_596_800),
            ("opt-6.7b", 6_658_473_984),
            ("opt-13b", 12_853_473_280),
            ("opt-30b", 29_974_540_288),
            ("opt-66b", 65_719_701_504),
            ("opt-175b", 174_604_468_224),
            ("distilgpt2", 81_912_576),
            ("gpt2", 124_439_808),
            ("gpt2-medium", 354_823_168),
            ("gpt2-large", 774_030_080),
            ("gpt2-xl", 1_557_611_200),
        ],
    )
    def test_ladder(self, name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * count - 1)
        )
        message = refusal(f"shape:{name}", MemoryLimitError)
        assert f"{count / 1e9:.2f} billion weights" in message
        assert f"needs {4 * count / 1e9:.1f} GB" in message

    def test_the_ladder_is_whole(self) -> None:
        assert len(shape_names()) == 14

    @pytest.mark.slow
    def test_smaller_dtype_needs_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=82e6 * 2.5))
        assert "float32" in refusal("shape:distilgpt2", MemoryLimitError)
        assert (
            load_source("shape:distilgpt2", dtype=torch.bfloat16).model.lm_head.weight.dtype
            == torch.bfloat16
        )

    def test_unknown_shape_lists_the_shapes(self) -> None:
        message = refusal("shape:opt-1b")
        assert all(name in message for name in shape_names())

    def test_bad_seed(self) -> None:
        assert "seed is -1" in refusal("shape:gpt2", UsageError, seed=-1)


def test_memory_is_checked_before_a_directory_is_loaded(
    opt_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    assert "of memory are free" in refusal(opt_directory, MemoryLimitError)


class TestModule:
    def test_used_as_it_is(self) -> None:
        model = tiny_opt_model().train()
        source = load_source(model)
        assert source.model is model
        assert model.training
        assert source.tokenizer is None
        assert source.description.kind == "module"
        assert source.description.name == "OPTForCausalLM"
        assert source.description.config is not None
        assert source.description.config["hidden_size"] == 16

    def test_plain_module_has_no_config(self) -> None:
        assert load_source(torch.nn.Linear(2, 2)).description.config is None

    def test_dtype_is_not_changed(self) -> None:
        assert ".to(torch.float64)" in refusal(tiny_opt_model(), UsageError, dtype=torch.float64)
        assert (
            load_source(tiny_opt_model().double(), dtype=torch.float64).model.lm_head.weight.dtype
            == torch.float64
        )

    def test_revision_makes_no_sense(self, opt_directory: Path) -> None:
        for source in (tiny_opt_model(), opt_directory, "shape:gpt2", BUNDLED):
            assert "does not come from the hub" in refusal(source, UsageError, revision="main")

    @pytest.mark.parametrize("source", [3, None, b"opt", ""])
    def test_neither_name_nor_module(self, source: Any) -> None:
        assert "expected" in refusal(source, UsageError)


class TestFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_any_dtype(self, value: float, dtype: torch.dtype) -> None:
        model = torch.nn.Linear(3, 5, dtype=dtype)
        check_finite(model, "it")
        model.weight.data[4, 1] = value
        with pytest.raises(SourceError, match="it has NaN or infinite weights in weight"):
            check_finite(model, "it")

    def test_checked_in_modules_and_directories(self, tmp_path: Path) -> None:
        model = tiny_opt_model()
        model.model.decoder.layers[1].fc1.bias.data[0] = float("nan")
        assert "model.decoder.layers.1.fc1.bias" in refusal(model)
        model.save_pretrained(tmp_path)
        assert "model.decoder.layers.1.fc1.bias" in refusal(tmp_path)

    def test_many_are_counted(self) -> None:
        model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
        for value in model.parameters():
            value.data.fill_(float("nan"))
        with pytest.raises(SourceError, match=r"0\.bias, 0\.weight, 1\.bias and 5 more"):
            check_finite(model, "it")

    def test_meta_and_empty_parameters_are_skipped(self) -> None:
        check_finite(torch.nn.Linear(2, 2, device="meta"), "it")
        check_finite(torch.nn.Embedding(0, 2), "it")
        check_causal(torch.nn.Linear(2, 2, device="meta"), "it")


def test_the_bundled_model() -> None:
    source = load_source(BUNDLED)
    assert source.description.kind == "bundled"
    assert source.description.sha256 is not None
    assert source.tokenizer is not None
    assert {value.dtype for value in source.model.parameters()} == {torch.float32}
    input_ids = source.tokenizer("The river rises in the hills.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert source.model(input_ids=input_ids, labels=input_ids).loss < 8


class TestQuantized:
    """Checkpoints of codes whose config.json says nothing of it."""

    def rewrite(self, tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = Path(shutil.copytree(source_directory(), tmp_path / "model"))
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def test_integer_matrices(self, tmp_path: Path) -> None:
        def to_int8(state: dict[str, Tensor]) -> None:
            name = next(key for key in state if key.endswith("fc1.weight"))
            state[name] = (state[name] * 100).to(torch.int8)

        folder = self.rewrite(tmp_path, to_int8)
        with pytest.raises(SourceError, match=r"fc1\.weight hold whole numbers: a quantized"):
            load_source(folder)

    def test_integer_matrices_of_a_pickle(self, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(source_directory(), tmp_path / "model"))
        state = load_file(folder / "model.safetensors")
        name = next(key for key in state if key.endswith("fc2.weight"))
        torch.save({**state, name: state[name].to(torch.int8)}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(SourceError, match=r"fc2\.weight hold whole numbers"):
            load_source(folder)

    @pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "SCB", "qzeros"])
    def test_scales_that_are_left_over(self, suffix: str, tmp_path: Path) -> None:
        def with_scale(state: dict[str, Tensor]) -> None:
            name = next(key for key in state if key.endswith("fc1.weight"))
            state[name] = state[name].to(torch.float8_e4m3fn)
            state[name.removesuffix("weight") + suffix] = torch.ones(1)

        folder = self.rewrite(tmp_path, with_scale)
        with pytest.raises(SourceError, match=rf"no place for .*{suffix}: its weights are quant"):
            load_source(folder)


def test_a_wrapper_of_several_devices_is_taken_off() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    assert load_source(torch.nn.DataParallel(model)).model is model
