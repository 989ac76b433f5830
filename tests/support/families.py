"""One small random model of each supported decoder family, what the family is made of, and which
inputs it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from tests.support.models import randomized

VOCAB, POSITIONS, LAYERS = 29, 32, 2

Builder = Callable[..., nn.Module]


def builder(kind: str, attention: str | None = None, **config: Any) -> Builder:
    """(dtype, seed) -> a random model of a Hugging Face model type; attention: its
    `attn_implementation`.
    """

    def build(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        described = transformers.AutoConfig.for_model(
            kind, bos_token_id=0, eos_token_id=0, **config
        )
        options = {} if attention is None else {"attn_implementation": attention}
        made = transformers.AutoModelForCausalLM.from_config(described, **options)
        model: nn.Module = randomized(made, seed).to(dtype)
        return model

    return build


@dataclass(frozen=True)
class Family:
    """The strings are for docs/reference/support.md. masks: takes (B, T, T) masks. position_ids:
    takes positions of a caller's choice.
    linear_head: logits are one linear layer, so `mean_embedding` is defined. casts: its code casts
    to float32."""

    build: Builder
    title: str
    example: str
    norm: str
    positions: str
    attention: str
    feed_forward: str
    masks: bool = True
    position_ids: bool = True
    linear_head: bool = True
    casts: bool = True


BASE = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
PLAIN = {**BASE, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}
WIDE = {**PLAIN, "hidden_size": 24}
GROUPED = {
    **BASE,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
}
HEADS_OF_6 = {**GROUPED, "head_dim": 6}
OPT = {
    **BASE,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "ffn_dim": 20,
    "word_embed_proj_dim": 12,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 12,
    "n_head": 3,
    "n_inner": 20,
    "n_layer": LAYERS,
    "n_positions": POSITIONS,
}
GPT_NEO = {
    "vocab_size": VOCAB,
    "hidden_size": 12,
    "num_heads": 3,
    "num_layers": LAYERS,
    "max_position_embeddings": POSITIONS,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 5,
    "intermediate_size": 20,
}
GPTJ = {**GPT2, "n_embd": 24, "rotary_dim": 4}
GEMMA2 = {
    **HEADS_OF_6,
    "sliding_window": 5,
    "query_pre_attn_scalar": 7,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 12, "n_head": 3, "n_layer": LAYERS}
FALCON = {**BASE, "hidden_size": 24, "num_attention_heads": 3, "ffn_hidden_size": 20}
FALCON_ALIBI = {
    **FALCON,
    "num_attention_heads": 4,
    "alibi": True,
    "multi_query": False,
    "parallel_attn": False,
    "bias": True,
}
FALCON_GROUPED = {
    **FALCON,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
}
MPT = {
    "vocab_size": VOCAB,
    "d_model": 12,
    "n_heads": 3,
    "n_layers": LAYERS,
    "max_seq_len": POSITIONS,
    "expansion_ratio": 2,
}
STABLELM = {**WIDE, "num_key_value_heads": 3, "partial_rotary_factor": 0.5}
GRANITE = {
    **GROUPED,
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
}
COHERE = {**GROUPED, "logit_scale": 0.5, "tie_word_embeddings": True}

LAYER_NORM, RMS = "LayerNorm", "RMSNorm"
ROTARY, ALIBI, LEARNED = "rotary", "ALiBi", "learned"
FULL, GROUPS = "multi-head", "grouped queries"

FAMILIES: dict[str, Family] = {
    "opt": Family(
        builder("opt", **OPT),
        "OPT",
        "facebook/opt-125m",
        LAYER_NORM,
        LEARNED,
        FULL,
        "ReLU",
        casts=False,
    ),
    "gpt2": Family(
        builder("gpt2", **GPT2),
        "GPT-2",
        "gpt2",
        LAYER_NORM,
        LEARNED,
        FULL + ", one q/k/v product",
        "GELU (tanh)",
        casts=False,
    ),
    "gpt_neo": Family(
        builder("gpt_neo", **GPT_NEO),
        "GPT-Neo",
        "EleutherAI/gpt-neo-125m",
        LAYER_NORM,
        LEARNED,
        FULL + ", local windows",
        "GELU (tanh)",
    ),
    "gpt_neox": Family(
        builder("gpt_neox", **{**WIDE, "rotary_pct": 0.5}),
        *(
            "GPT-NeoX, Pythia",
            "EleutherAI/pythia-160m",
            LAYER_NORM,
            "rotary, part of a head",
            FULL + ", parallel to the feed-forward",
        ),
        "GELU",
    ),
    "gptj": Family(
        builder("gptj", **GPTJ),
        *(
            "GPT-J",
            "EleutherAI/gpt-j-6b",
            LAYER_NORM,
            "rotary, interleaved, part of a head",
            FULL + ", parallel on one norm",
        ),
        "GELU (tanh)",
    ),
    "llama": Family(
        builder("llama", **GROUPED),
        "LLaMA",
        "meta-llama/Llama-3.2-1B",
        RMS,
        ROTARY,
        GROUPS,
        "SwiGLU",
    ),
    "mistral": Family(
        builder("mistral", **{**GROUPED, "sliding_window": 5}),
        *(
            "Mistral",
            "mistralai/Mistral-7B-v0.1",
            RMS,
            ROTARY,
            GROUPS + ", sliding window",
            "SwiGLU",
        ),
    ),
    "qwen2": Family(
        builder("qwen2", **GROUPED),
        "Qwen2",
        "Qwen/Qwen2.5-0.5B",
        RMS,
        ROTARY,
        GROUPS + ", biased q/k/v",
        "SwiGLU",
    ),
    "qwen3": Family(
        builder("qwen3", **HEADS_OF_6),
        "Qwen3",
        "Qwen/Qwen3-0.6B",
        RMS + ", also of q and k per head",
        ROTARY,
        GROUPS,
        "SwiGLU",
    ),
    "gemma": Family(
        builder("gemma", **HEADS_OF_6),
        "Gemma",
        "google/gemma-2b",
        RMS + " with gain 1 + w",
        ROTARY,
        GROUPS,
        "gated GELU (tanh)",
    ),
    "gemma2": Family(
        builder("gemma2", **GEMMA2),
        *("Gemma 2", "google/gemma-2-2b", RMS + " with gain 1 + w, around each branch", ROTARY),
        *(
            GROUPS + ", sliding windows, soft-capped scores",
            "gated GELU (tanh); soft-capped logits",
        ),
        linear_head=False,
    ),
    "phi": Family(
        builder("phi", **{**WIDE, "partial_rotary_factor": 0.5}),
        *(
            "Phi-1, Phi-2",
            "microsoft/phi-2",
            LAYER_NORM,
            "rotary, part of a head",
            FULL + ", parallel on one norm",
            "GELU (tanh)",
        ),
    ),
    "phi3": Family(
        builder("phi3", **GROUPED),
        *(
            "Phi-3",
            "microsoft/Phi-3-mini-4k-instruct",
            RMS,
            ROTARY,
            GROUPS + ", one q/k/v product",
            "SwiGLU, gate and up in one product",
        ),
    ),
    "bloom": Family(
        builder("bloom", **BLOOM),
        *(
            "BLOOM",
            "bigscience/bloom-560m",
            LAYER_NORM + ", also of the embedding",
            ALIBI,
            FULL + ", one q/k/v product",
            "GELU (tanh)",
        ),
        masks=False,
        position_ids=False,
    ),
    "falcon": Family(
        builder("falcon", **FALCON),
        *(
            "Falcon 7B",
            "tiiuae/falcon-7b",
            LAYER_NORM,
            ROTARY,
            "one key/value head, parallel on one norm",
            "GELU",
        ),
    ),
    "falcon_grouped": Family(
        builder("falcon", **FALCON_GROUPED),
        *(
            "Falcon 40B",
            "tiiuae/falcon-40b",
            LAYER_NORM + ", one for each branch",
            ROTARY,
            GROUPS + ", parallel",
            "GELU",
        ),
    ),
    "falcon_alibi": Family(
        builder("falcon", **FALCON_ALIBI),
        *("Falcon RW", "tiiuae/falcon-rw-1b", LAYER_NORM, ALIBI, FULL, "GELU"),
        masks=False,
        position_ids=False,
    ),
    "mpt": Family(
        builder("mpt", **MPT),
        *(
            "MPT",
            "mosaicml/mpt-7b",
            LAYER_NORM + " without shift",
            ALIBI,
            FULL + ", one q/k/v product",
            "GELU",
        ),
        position_ids=False,
    ),
    "stablelm": Family(
        builder("stablelm", **STABLELM),
        *(
            "StableLM",
            "stabilityai/stablelm-3b-4e1t",
            LAYER_NORM,
            "rotary, part of a head",
            FULL,
            "SwiGLU",
        ),
    ),
    "olmo2": Family(
        builder("olmo2", **GROUPED),
        *(
            "OLMo 2",
            "allenai/OLMo-2-1124-7B",
            RMS + " after each branch, also of q and k",
            ROTARY,
            GROUPS,
            "SwiGLU",
        ),
    ),
    "granite": Family(
        builder("granite", **GRANITE),
        *(
            "Granite",
            "ibm-granite/granite-3.0-2b-base",
            RMS,
            ROTARY,
            GROUPS,
            "SwiGLU; scaled embedding, branches and logits",
        ),
    ),
    "cohere": Family(
        builder("cohere", **COHERE),
        *(
            "Cohere",
            "CohereLabs/c4ai-command-r-v01",
            LAYER_NORM + " without shift",
            "rotary, interleaved",
            GROUPS + ", parallel on one norm",
        ),
        "SwiGLU; scaled logits",
    ),
}
