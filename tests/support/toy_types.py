"""A small random model of any causal type of the installed transformers: sizes by the names that
configs give them, a layer of every kind, and a few exceptions.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import randomized

MOST = 30_000_000  # weights of a model that is still small

# Whatever a config calls its sizes; only names that it has are set.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 29),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "model_dim", "emb_dim"), 16),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "input_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    "num_encoder_layers": 2,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 20),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "dff", "d_inner"), 20),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "swa_head_dim"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 64),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    "mamba_d_ssm": 32,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("moe_num_experts", "num_zero_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "adapter_rank"), 4),
    **dict.fromkeys(("index_head_dim", "index_topk"), 4),
    "index_n_heads": 32,  # with few heads scores of the indexer are 0 together, and choices a tie
    **dict.fromkeys(("num_kv_shared_layers", "num_dense_layers", "first_k_dense_replace"), 0),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 29),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
    "is_decoder": True,
    "rotary_dim": 4,
}

# Lists with an entry for every layer: one of each kind stays.
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

# What no rule gives: sizes that have to fit each other, or parts that a text model has no use for.
_HYBRID = ["mamba", "attention"]
_MLP_EVERY_OTHER = ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"]
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{
            f"{name}_config": {
                **dict.fromkeys(("hidden_size", "hidden_size_global", "intermediate_size"), 16),
                **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2),
                **dict.fromkeys(("vocab_size", "max_position_embeddings"), 64),
            }
            for name in ("patcher", "encoder", "decoder", "global")
        },
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 20, "moe_top_k": 2},
    },
    "dory": {
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 2),
        "layer_types": _MLP_EVERY_OTHER,
        "num_hidden_layers": 6,
    },
    "dots3_note": {name: {"adapter_out_dim": 16} for name in ("vision_config", "audio_config")},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": _HYBRID, "layers_block_type": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba": {"intermediate_size": 32},
    "mamba2": {"head_dim": 8, "num_heads": 4, "n_groups": 1},
    "nemotron_h": {"n_groups": 2},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1},
        "audio_config": {
            **dict.fromkeys(("hidden_size", "intermediate_size", "nemo_conv_channels"), 16),
            **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel"), 16),
            "num_blocks": 1,
        },
    },
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (8, 8)},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}


def toy_model(kind: str) -> Any:
    """A random model of a type, in float64 and eval mode. Raises what transformers raises, and
    ValueError for one that stays large.
    """
    config = toy_config(kind)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST:
        raise ValueError(f"its toy config still has {count / 1e6:.0f} M weights")
    torch.manual_seed(0)
    model = randomized(AutoModelForCausalLM.from_config(config)).double().eval()
    if model.get_experts_implementation()[""] is not None:
        model.set_experts_implementation("eager")  # the model's own loop, in any dtype
    return model


def toy_config(kind: str) -> PreTrainedConfig:
    made = CONFIG_MAPPING[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config: PreTrainedConfig = made(**{**_sizes(made()), **EXCEPTIONS.get(kind, {})})
    return config


def _sizes(default: Any) -> dict[str, Any]:
    known = default.to_dict()
    known |= {name: None for name, real in default.attribute_map.items() if real in known}
    given = {name: value for name, value in SMALL.items() if name in known}
    given |= _layers(known)
    if "qk_rope_head_dim" in given:  # of latent attention: heads have no other width
        given.pop("head_dim", None)
        given["num_key_value_heads"] = given["num_attention_heads"]
    for name in getattr(default, "sub_configs", {}):
        part = getattr(default, name, None)
        if name in ("text_config", "decoder") and part is not None:
            given[name] = {**_sizes(part), **EXCEPTIONS.get(part.model_type, {})}
        elif part is not None and not set(_BY_LAYER) & set(part.to_dict()):
            # what sees or hears, which no token reaches
            given[name] = {each: 1 for each in (*_COUNTS, "depth") if each in part.to_dict()}
    return given


def _layers(known: dict[str, Any]) -> dict[str, Any]:
    """Lists that name a layer's kind, with each kind once, and how many layers that are."""
    kinds = {
        name: list(dict.fromkeys(known[name]))
        for name in _BY_LAYER
        if isinstance(known.get(name), list) and known[name]
    }
    most = max([2, *map(len, kinds.values())])
    given: dict[str, Any] = {
        name: [each[i % len(each)] for i in range(most)] for name, each in kinds.items()
    }
    return given | {name: most for name in _COUNTS if name in known}
