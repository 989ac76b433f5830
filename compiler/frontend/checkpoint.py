"""Checkpoints: a directory that save_pretrained wrote -> a model in eval mode and its tokenizer.

transformers fills weights that it does not find with random numbers and only warns; here that is an
error.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tintc.compiler.frontend.files import ADAPTER, check_there, linked, looks_like, read_json
from tintc.compiler.frontend.messages import first_line, listed, untrusted
from tintc.compiler.frontend.model_checks import (
    build_without_weights,
    check_causal,
    check_finite,
    check_memory,
    check_supported,
)
from tintc.compiler.frontend.quantized import refuse_integers, refuse_scales
from tintc.compiler.frontend.tokenizer import load_tokenizer
from tintc.compiler.frontend.weights import SUFFIXES, digest, weight_files
from tintc.ir.errors import SourceError, UnsupportedModelError

_IMPLEMENTATIONS = {
    prefix + name + suffix
    for name in ("attn_implementation", "experts_implementation")
    for prefix, suffix in (("", ""), ("_", ""), ("_", "_internal"))
}
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

    def check_fits(self, config: PreTrainedConfig) -> None:
        """Raises MemoryLimitError for a model whose weights do not fit in memory."""
        check_memory(config, self.name, self.dtype, self.trust_remote_code)

    def weight_files(self, directory: Path, config: PreTrainedConfig) -> list[Path]:
        """Its weight files. Raises SourceError for those that are missing or cut."""
        return weight_files(directory, self.name, chosen_weights(config))

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

    def load(self, directory: Path, config: PreTrainedConfig, files: Sequence[Path]) -> Loaded:
        """The model, its tokenizer and the digest of its weight files, which are `files`.

        Raises SourceError (weights or tokenizer missing, damaged, quantized or not finite) and
        UnsupportedModelError (not causal).
        """
        sha256 = digest(files, self.name)
        refuse_integers(files, self.name)
        self._say_what_is_left_out(directory)
        with linked(_beside(directory, files), directory.resolve().name) as alone:
            model = self._load_model(alone, config, files)
        check_finite(model, self.name)
        check_causal(model, self.name)
        values = read_json(directory / "config.json", self.name)  # which a tokenizer reads, too
        with _without_implementations(directory, values) as cleaned:
            tokenizer = load_tokenizer(cleaned, self.name, **self._arguments)
        return Loaded(model, tokenizer, sha256)

    def _say_what_is_left_out(self, directory: Path) -> None:
        if (directory / ADAPTER).is_file():
            _log.warning(
                "%s: the adapter beside the model (%s) is not applied: these are the model's own "
                "weights; to simulate the adapted model, merge it with peft (merge_and_unload), "
                "write that with save_pretrained and compile it",
                self.name,
                ADAPTER,
            )

    @property
    def _arguments(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": self.local_only}

    def read_config(self, directory: Path) -> PreTrainedConfig:
        """The config of a model that is supported; no weights are needed yet. Raises SourceError
        and UnsupportedModelError.
        """
        check_there(directory / "config.json", self.name)
        if not (directory / "config.json").is_file():
            expected = looks_like([path.name for path in directory.iterdir()])
            raise SourceError(f"{self.name} has no config.json; expected {expected}")
        values = read_json(directory / "config.json", self.name)
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
            raise untrusted(self.name)
        if config_class is None and not has_code:
            raise UnsupportedModelError(
                f"{self.name} has model_type {declared!r} in its config.json, which transformers "
                f"{transformers.__version__} does not know"
            )
        try:
            with _without_implementations(directory, values) as cleaned:
                config = AutoConfig.from_pretrained(cleaned, **self._arguments)
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


@contextlib.contextmanager
def _without_implementations(directory: Path, values: dict[str, Any]) -> Iterator[Path]:
    """The directory with a config.json that names no implementation of attention or experts: tintc
    chooses that, and one of the hub would be code that transformers fetches and runs.
    """
    cleaned = without_implementations(values)
    if cleaned == values:
        yield directory
        return
    others = {path.name: path for path in directory.iterdir() if path.name != "config.json"}
    with linked(others, directory.resolve().name) as copy:
        (copy / "config.json").write_text(json.dumps(cleaned), encoding="utf-8")
        yield copy


def without_implementations(value: Any) -> Any:
    """A config, or a part of one, without what names an implementation, however deep."""
    if isinstance(value, list):
        return [without_implementations(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {key: each for key, each in value.items() if key not in _IMPLEMENTATIONS}
    return {key: without_implementations(each) for key, each in kept.items()}


def chosen_weights(config: PreTrainedConfig) -> object:
    """The file of weights that a config names, which transformers then reads instead of the usual
    ones; or None.
    """
    return getattr(config, "transformers_weights", None)


def _beside(directory: Path, files: Sequence[Path]) -> dict[str, Path]:
    """What transformers is to see of a directory: these weights and no others, and no adapter,
    which it would put into the model where peft is installed.
    """
    unread = {path for ending in SUFFIXES for path in directory.glob(f"*{ending}")}
    unread = {directory / ADAPTER, *unread} - set(files)
    return {path.name: path for path in directory.iterdir() if path not in unread}


def attention_of(config: PreTrainedConfig) -> str | None:
    """`sdpa` where the model has it, which captures as one operator; None lets a model without it
    use its own.
    """
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return "sdpa" if transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else None
