"""Further configurations of the families: each changes one thing. The part of a name before the
hyphen is the family's.
"""

from __future__ import annotations

from typing import Any

from tests.support.families import (
    BLOOM,
    FALCON_ALIBI,
    GEMMA2,
    GPT2,
    GPT_NEO,
    GROUPED,
    HEADS_OF_6,
    MPT,
    OPT,
    STABLELM,
    WIDE,
    Builder,
    builder,
)

# Wavelengths of a head of 8 at theta 10000: 6, 63, 628 and 6283 tokens, so both kinds of scaling
# fall on either side of 8 positions.
HEADS_OF_8 = {**GROUPED, "head_dim": 8}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 2.0,
        "beta_slow": 0.1,
        "original_max_position_embeddings": 8,
    },
}
LLAMA_ACTIVATIONS = ("relu", "gelu", "gelu_pytorch_tanh", "quick_gelu")
SPELLED_GELUS = ("gelu_fast", "gelu_python", "gelu_accurate", "quick_gelu")


def one_layer(kind: str, attention: str | None = None, **config: Any) -> Builder:
    """For what does not depend on depth: half the time to capture."""
    counts = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
    return builder(
        kind, attention, **{name: 1 if name in counts else value for name, value in config.items()}
    )


VARIANTS: dict[str, Builder] = {
    "opt-post-norm": builder("opt", **OPT, do_layer_norm_before=False),
    "opt-eager": builder("opt", "eager", **OPT),
    "gpt2-eager": builder("gpt2", "eager", **GPT2),
    **{
        f"gpt2-{name}": one_layer("gpt2", **GPT2, activation_function=name)
        for name in SPELLED_GELUS
    },
    "gpt_neo-local": one_layer("gpt_neo", **{**GPT_NEO, "attention_types": [[["local"], 1]]}),
    "gpt_neox-sequential": builder(
        "gpt_neox", **WIDE, rotary_pct=0.25, use_parallel_residual=False
    ),
    "gpt_neox-whole-rotary": one_layer(
        "gpt_neox", "eager", **WIDE, rotary_pct=1.0, attention_bias=False
    ),
    **{
        f"llama-rope-{name}": one_layer(
            "llama", **HEADS_OF_8, rope_parameters={"rope_theta": 10000.0, **rope}
        )
        for name, rope in ROPES.items()
    },
    "llama-eager": builder("llama", "eager", **GROUPED),
    "llama-biases": one_layer("llama", **GROUPED, attention_bias=True, mlp_bias=True),
    "llama-head-dim": one_layer("llama", **HEADS_OF_6),
    "llama-all-heads": one_layer(
        "llama", **{**GROUPED, "num_key_value_heads": 4}, tie_word_embeddings=True
    ),
    "llama-one-kv-head": one_layer("llama", **{**GROUPED, "num_key_value_heads": 1}),
    **{
        f"llama-{name}": one_layer("llama", **GROUPED, hidden_act=name)
        for name in LLAMA_ACTIVATIONS
    },
    **{
        f"mistral-{name}": builder("mistral", name, **GROUPED, sliding_window=4)
        for name in ("eager", "sdpa")
    },
    "mistral-no-window": one_layer("mistral", **GROUPED, sliding_window=None),
    "qwen2-windows": builder(
        "qwen2", **GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma2-no-caps": one_layer(
        "gemma2", **{**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    ),
    "phi-qk-norm": one_layer("phi", **WIDE, partial_rotary_factor=0.5, qk_layernorm=True),
    "bloom-12-heads": one_layer("bloom", **{**BLOOM, "hidden_size": 24, "n_head": 12}),
    "bloom-residual-after-norm": builder(
        "bloom", **BLOOM, apply_residual_connection_post_layernorm=True
    ),
    # Computed with ALiBi twice by transformers 5.23.
    "falcon_alibi-eager": one_layer("falcon", "eager", **FALCON_ALIBI),
    "falcon_alibi-parallel": builder(
        "falcon", **{**FALCON_ALIBI, "parallel_attn": True, "multi_query": True}
    ),
    "mpt-4-heads": one_layer("mpt", **{**MPT, "n_heads": 4}),
    "stablelm-parallel": builder(
        "stablelm", **STABLELM, use_parallel_residual=True, use_qkv_bias=True
    ),
}

# Falcon rounds ALiBi to bfloat16: with 12 heads its slopes are no powers of two, and its logits off
# by 1e-3.
ROUNDED_ALIBI = {
    "falcon_alibi-12-heads": builder("falcon", **{**FALCON_ALIBI, "num_attention_heads": 12})
}
