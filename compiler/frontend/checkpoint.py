"""Checkpoints: a directory that save_pretrained wrote -> a model in eval mode and its tokenizer.

transformers fills weights that it does not find with random numbers and only warns; here that is an
error.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from tintc.compiler.frontend.hub import first_line
from tintc.compiler.frontend.model_checks import (
    build_without_weights,
    check_causal,
    check_finite,
    check_memory,
    check_supported,
    listed,
)
from tintc.compiler.frontend.quantized import refuse_integers, refuse_scales
from tintc.ir.errors import SourceError, UnsupportedModelError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer where it has one, and the digest of its weight files."""

    model: torch.nn.Module
    tokenizer: Any | None
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """How to load a checkpoint, and what to call it in messages."""

    name: str
    dtype: torch.dtype
    trust_remote_code: bool
    local_only: bool

    def read_fitting_config(self, directory: Path) -> PreTrainedConfig:
        """`read_config` of a model whose weights fit in memory. Raises MemoryLimitError if they do
        not.
        """
        config = self.read_config(directory)
        check_memory(config, self.name, self.dtype, self.trust_remote_code)
        return config

    def without_weights(self, config: PreTrainedConfig) -> torch.nn.Module:
        """The model on the meta device: shapes and no numbers. Raises SourceError for a config that
        makes no model.
        """
        options = {
            "dtype": self.dtype,
            "attn_implementation": attention_of(config),
            "trust_remote_code": self.trust_remote_code,
        }
        return build_without_weights(config, self.name, **options)

    def load(self, directory: Path, config: PreTrainedConfig) -> Loaded:
        """The model, its tokenizer and the digest of its weight files.

        Raises SourceError (weights or tokenizer missing, damaged, quantized or not finite) and
        UnsupportedModelError (not causal).
        """
        files = _weight_files(directory, self.name)
        refuse_integers(files, self.name)
        model = self._load_model(directory, config, files)
        check_finite(model, self.name)
        check_causal(model, self.name)
        return Loaded(model, self._load_tokenizer(directory), digest(files))

    @property
    def _arguments(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": self.local_only}

    def read_config(self, directory: Path) -> PreTrainedConfig:
        """The config of a model that is supported; no weights are needed yet. Raises SourceError
        and UnsupportedModelError.
        """
        if not (directory / "config.json").is_file():
            raise SourceError(f"{self.name} has no config.json; expected {_looks_like(directory)}")
        values = _read_json(directory / "config.json", self.name)
        declared = values.get("model_type")
        config_class = (
            transformers.CONFIG_MAPPING[declared]
            if declared in list(transformers.CONFIG_MAPPING)
            else None
        )
        has_code = "AutoModelForCausalLM" in (values.get("auto_map") or ())
        if (
            has_code
            and config_class not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            and not self.trust_remote_code
        ):
            raise self._untrusted()
        if config_class is None and not has_code:
            raise UnsupportedModelError(
                f"{self.name} has model_type {declared!r} in its config.json, which transformers "
                f"{transformers.__version__} does not know"
            )
        try:
            config = AutoConfig.from_pretrained(directory, **self._arguments)
        except Exception as error:
            raise SourceError(
                f"{self.name} has a config.json that transformers refuses: {first_line(error)}"
            ) from error
        check_supported(config, self.name)
        return config

    def _load_model(
        self, directory: Path, config: PreTrainedConfig, files: Sequence[Path]
    ) -> torch.nn.Module:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=self.dtype,
                attn_implementation=attention_of(config),
                output_loading_info=True,
                # check_report refuses them, where transformers would only log them
                ignore_mismatched_sizes=True,
                **self._arguments,
            )
        except Exception as error:
            if (
                files[0].suffix == ".bin"
            ):  # torch's own message advises to unpickle the file after all
                raise SourceError(
                    f"{self.name}: {listed([file.name for file in files])} is damaged or holds "
                    "more than tensors, which tintc "
                    f"does not unpickle ({type(error).__name__}); expected the weights alone, best "
                    "as safetensors"
                ) from error
            raise SourceError(
                f"{self.name}: the weights cannot be loaded: {first_line(error)}"
            ) from error
        check_report(report, self.name, "config.json")
        loaded: torch.nn.Module = model.eval()
        return loaded

    def _load_tokenizer(self, directory: Path) -> Any | None:
        if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(directory, **self._arguments)
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise self._untrusted() from error
            raise SourceError(
                f"{self.name}: its tokenizer cannot be loaded: {first_line(error)}"
            ) from error

    def _untrusted(self) -> SourceError:
        return SourceError(
            f"{self.name} brings Python code of its own, which would run on this machine; read it "
            "first, then pass trust_remote_code=True if you trust it"
        )


def check_report(report: Mapping[str, Any], name: str, described_by: str) -> None:
    """Judges what transformers reports after loading: missing and mismatched weights would hold
    random numbers.

    described_by: what says which weights there should be, for the message. Raises SourceError.
    """
    if report["mismatched_keys"]:
        key, found, expected = sorted(report["mismatched_keys"])[0]
        raise SourceError(
            f"{name}: the weights do not fit {described_by}: {key} has shape {tuple(found)}, "
            f"expected {tuple(expected)} "
            f"({len(report['mismatched_keys'])} such weights)"
        )
    if report["missing_keys"]:
        raise SourceError(
            f"{name}: the weights lack {listed(report['missing_keys'])}, which {described_by} asks "
            "for; "
            "they are incomplete or belong to another model"
        )
    if report["unexpected_keys"]:
        refuse_scales(report["unexpected_keys"], name)
        _log.warning(
            "%s: weights that %s does not ask for are left out: %s",
            name,
            described_by,
            listed(report["unexpected_keys"]),
        )


def _looks_like(directory: Path) -> str:
    """What to tell the user about a directory without config.json."""
    if (directory / "adapter_config.json").is_file():
        return (
            "a whole model, but this is an adapter: merge it into its base model and save that "
            "with save_pretrained"
        )
    if files := sorted(path.name for path in directory.glob("*.gguf")):
        return (
            f"a directory written by save_pretrained, or the path of one GGUF file: {files[0]} in "
            "it"
        )
    return "a directory written by save_pretrained"


def attention_of(config: PreTrainedConfig) -> str | None:
    """`sdpa` where the model has it, which captures as one operator; None lets a model without it
    use its own.
    """
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return "sdpa" if transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else None


def weight_names(directory: Path, present: Collection[str], name: str) -> list[str]:
    """The weight files among `present`, in transformers' order of preference; an index in
    `directory` names its shards.

    Raises SourceError for an index that cannot be read.
    """
    for file in ("model.safetensors", "pytorch_model.bin"):
        if file in present:
            return [file]
        if f"{file}.index.json" in present:
            shards = _read_json(directory / f"{file}.index.json", name).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise SourceError(
                    f"{name}: {file}.index.json has no weight_map; expected one written by "
                    "save_pretrained"
                )
            return sorted({str(shard) for shard in shards.values()})
    return []


def _weight_files(directory: Path, name: str) -> list[Path]:
    """The weight files, all there and every safetensors file whole."""
    names = weight_names(directory, [path.name for path in directory.iterdir()], name)
    if not names:
        raise SourceError(
            f"{name} has no weights; expected model.safetensors (or its shards and index) or "
            "pytorch_model.bin"
        )
    absent = [file for file in names if not (directory / file).is_file()]
    if absent:
        raise SourceError(
            f"{name} lacks {listed(absent)}, which its index names; fetch or copy the missing files"
        )
    for file in names:
        if file.endswith(".safetensors"):
            try:
                with safetensors.safe_open(directory / file, framework="pt"):
                    pass  # opening checks the header and the length
            except Exception as error:
                raise SourceError(
                    f"{name}: {file} is truncated or damaged ({first_line(error)}); fetch or copy "
                    "it again"
                ) from error
    return [directory / file for file in names]


def digest(files: Sequence[Path]) -> str:
    """The SHA-256 of one file; of several, that of their hexadecimal digests joined in order of
    their names.
    """
    digests = []
    for path in sorted(files):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{name} has a {path.name} that cannot be read: {first_line(error)}"
        ) from error
    if not isinstance(values, dict):
        raise SourceError(
            f"{name} has a {path.name} that holds a {type(values).__name__}; expected a JSON object"
        )
    return values
