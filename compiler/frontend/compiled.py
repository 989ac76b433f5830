"""A compiled simulator as a source: its auxiliary model, built again from the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig

from tintc.compiler.artifact_files import INNER_LR
from tintc.compiler.artifact_reader import read_manifest
from tintc.compiler.artifact_schema import TOKENIZER, WEIGHTS, Manifest
from tintc.compiler.artifact_tokenizer import load_tokenizer
from tintc.compiler.frontend.checkpoint import Loaded, attention_of, without_implementations
from tintc.compiler.frontend.messages import first_line, listed
from tintc.compiler.frontend.model_checks import build_without_weights, check_memory
from tintc.ir.errors import SourceError
from tintc.ir.inputs import is_models_own

# Fields of a transformers config that say how to run a model, some of which fetch code.
_NOT_ARCHITECTURE = {"model_type", "dtype", "torch_dtype", "auto_map", "quantization_config"}


def architecture(config: dict[str, Any], name: str) -> PreTrainedConfig:
    """The transformers config that a manifest holds. Raises SourceError for a model whose code came
    with it.
    """
    cleaned = without_implementations(config)
    fields = {key: value for key, value in cleaned.items() if key not in _NOT_ARCHITECTURE}
    try:
        found: PreTrainedConfig = AutoConfig.for_model(str(config.get("model_type")), **fields)
    except Exception as error:
        raise SourceError(
            f"{name}: its model cannot be built again from its config: {first_line(error)}"
        ) from error
    return found


def read_config(root: Path, name: str) -> PreTrainedConfig:
    """The config of an artifact's auxiliary model. Raises ArtifactError, and SourceError where
    there is none.
    """
    return _config(read_manifest(root), name)


def without_weights(config: PreTrainedConfig, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The auxiliary model on the meta device."""
    return build_without_weights(
        config, name, dtype=dtype, attn_implementation=attention_of(config)
    )


def load(root: Path, name: str, dtype: torch.dtype | None) -> Loaded:
    """The auxiliary model under the artifact's weights, its tokenizer and the digest of its weight
    file. dtype: default as stored.

    Raises ArtifactError, and SourceError where the model cannot be built again.
    """
    manifest = read_manifest(root)
    config = _config(manifest, name)
    stored = {
        key: value
        for key, value in load_file(root / WEIGHTS).items()
        if key != INNER_LR and is_models_own(key)
    }
    kind = dtype or next(value.dtype for value in stored.values() if value.is_floating_point())
    check_memory(config, name, kind, trust_remote_code=False)
    model = without_weights(config, name, kind)
    weights = {
        key: value.to(kind) if value.is_floating_point() else value for key, value in stored.items()
    }
    fill(model, weights, manifest.aliases, name)
    return Loaded(model, load_tokenizer(root / TOKENIZER), manifest.files[WEIGHTS].sha256)


def fill(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], aliases: dict[str, str], name: str
) -> None:
    """Gives a model on the meta device its weights. aliases: further names of tied ones.

    Raises SourceError for weights of another model.
    """
    weights = weights | {alias: weights[key] for alias, key in aliases.items()}
    strange = model.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    for alias, key in aliases.items():  # of two parameters that share their numbers one is made
        owner, _, leaf = alias.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = model.get_parameter(key)
    strange += [key for key, value in model.named_parameters() if value.is_meta]
    if strange:
        raise SourceError(
            f"{name}: its weights are not those of the model that its config describes: "
            f"{listed(strange)}"
        )


def _config(manifest: Manifest, name: str) -> PreTrainedConfig:
    config = manifest.source.config
    if config is None:
        raise SourceError(
            f"{name} was compiled from a module in Python, whose code it does not hold; pass what "
            "it was compiled from"
        )
    return architecture(config, name)
