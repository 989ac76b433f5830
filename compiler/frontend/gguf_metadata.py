"""What a GGUF file says about its architecture, compared with the config that transformers makes.

transformers passes over what it does not know. The result would be another model than the file's,
so every entry is one that transformers puts into the config, or is compared with the config here,
or is in `_HARMLESS`.

Only llama.cpp's source says what a family's name means. The facts about single families here are
`_UNSAID_OF`, and the lines about StableLM in `_filled` and Falcon in `_sizes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedConfig

from tintc.ir.errors import UnsupportedModelError

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
    "rope.scaling.original_context_length": "only yarn and longrope use it; rope.scaling.type and "
    ".attn_factor are compared",
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


INSTEAD = (
    "pass the model's own checkpoint instead: a hub id, or a directory written by save_pretrained"
)


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


def check_metadata(header: Header, config: PreTrainedConfig, name: str) -> None:
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
        raise UnsupportedModelError(f"{name} {said}, and {does}; {INSTEAD}")


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
