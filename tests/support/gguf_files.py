"""Tiny models, written to GGUF files as llama.cpp's converter writes them. Needs the package
gguf.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import pre_tokenizers

LAYERS, HEADS, KEY_HEADS, HIDDEN, INNER, LENGTH = 2, 4, 2, 32, 64, 64
EPS, THETA = 2.0**-16, 50000.0  # exact in float32, which metadata are
MERGES = ["t h", "th e", "Ġ the", "Ġ Ġ", "ĠĠ Ġ"]
TOKENS = [
    "<|start|>",
    "<|end|>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
]
# What llama.cpp's converter writes about other architectures, as `write_metadata` takes it.
RMS = {"attention.layer_norm_rms_epsilon": EPS, "feed_forward_length": INNER}
NORM = {"attention.layer_norm_epsilon": EPS, "feed_forward_length": INNER}
GROUPED = {"attention.head_count_kv": KEY_HEADS}
HEAD = HIDDEN // HEADS
GEMMA2 = {**RMS, **GROUPED, "attention.key_length": 16, "attention.value_length": 16}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
STABLELM = {**NORM, **GROUPED, "rope.dimension_count": HEAD // 4}
MULTI_QUERY = {
    "attention.layer_norm_epsilon": 1e-5,
    "feed_forward_length": 4 * HIDDEN,
    "attention.head_count_kv": 1,
    "tensor_data_layout": "jploski",
}
PHI3 = {
    **RMS,
    **GROUPED,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": HEAD,
    "rope.scaling.original_context_length": 4096,
}
ORDINARY: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {**RMS, **GROUPED, "rope.freq_base": THETA}),
    (
        "qwen3",
        {
            **RMS,
            **GROUPED,
            "rope.freq_base": THETA,
            "attention.key_length": 128,
            "attention.value_length": 128,
        },
    ),
    ("phi3", {**PHI3, "attention.sliding_window": 0}),
    ("gemma2", {**GEMMA2, **CAPS, "attention.sliding_window": 4096}),
    ("gemma2", {**GEMMA2, **CAPS, "attention.sliding_window": 512}),
    ("gemma2", GEMMA2),  # the first ones
    ("stablelm", {**STABLELM, "use_parallel_residual": True, "rope.freq_base": 10000.0}),
    ("stablelm", {**STABLELM, "use_parallel_residual": False}),
    ("bloom", {**NORM, "feed_forward_length": 4 * HIDDEN, "attention.head_count_kv": HEADS}),
    ("falcon", MULTI_QUERY),
    ("gpt2", {**NORM, "feed_forward_length": 4 * HIDDEN}),
    ("starcoder2", {**NORM, **GROUPED, "rope.freq_base": 10000.0}),
    ("mistral", {**RMS, **GROUPED, "rope.dimension_count": HEAD, "attention.sliding_window": 4096}),
]
# Entries that transformers passes over, and what a refusal says.
LOST: list[tuple[str, dict[str, Any], str]] = [
    (
        "gemma2",
        {**GEMMA2, **CAPS, "attn_logit_softcapping": 20.0},
        "attn_logit_softcapping = 20.0, and the Gemma2Config that",
    ),
    (
        "gemma2",
        {**GEMMA2, **CAPS, "final_logit_softcapping": 15.0},
        "final_logit_softcapping = 15.0",
    ),
    (
        "mistral",
        {**RMS, **GROUPED, "rope.dimension_count": HEAD},
        "has no mistral.attention.sliding_window, which means 0",
    ),
    (
        "starcoder2",
        {**NORM, **GROUPED, "rope.freq_base": THETA},
        "starcoder2.rope.freq_base = 50000.0",
    ),
    ("stablelm", {**NORM, **GROUPED}, "has no stablelm.rope.dimension_count, which means 8"),
    ("falcon", {**MULTI_QUERY, **NORM}, "falcon.attention.layer_norm_epsilon = 1.52587"),
    ("falcon", {**MULTI_QUERY, "attention.head_count_kv": 2}, "falcon.attention.head_count_kv = 2"),
    ("gpt2", {**NORM, "feed_forward_length": 3 * HIDDEN}, "gpt2.feed_forward_length = 96"),
    (
        "bloom",
        {**NORM, "feed_forward_length": 4 * HIDDEN, "attention.max_alibi_bias": 4.0},
        "max_alibi_bias = 4.0",
    ),
    ("phi3", {**PHI3, "rope.scaling.attn_factor": 1.19}, "rope.scaling.attn_factor = 1.19"),
    ("phi3", {**PHI3, "attention.sliding_window": 2047}, "phi3.attention.sliding_window = 2047"),
]
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "transformer.h": "blk",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def llama(**config: Any) -> transformers.LlamaForCausalLM:
    """A random LLaMA, whose weights are large enough that a wrong one shows."""
    values = {
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }
    return _disturbed(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**values, **config}))
    )


def gpt2() -> transformers.GPT2LMHeadModel:
    """A random GPT-2."""
    sizes = {
        "vocab_size": len(TOKENS),
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": LENGTH,
    }
    config = transformers.GPT2Config(
        **sizes, layer_norm_epsilon=EPS, bos_token_id=0, eos_token_id=1
    )
    return _disturbed(transformers.GPT2LMHeadModel(config))


def write(
    path: Path,
    model: transformers.PreTrainedModel,
    kind: str = "F32",
    *,
    architecture: str | None = None,
    metadata: dict[str, Any] | None = None,
    without: Collection[str] = (),
    change: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> Path:
    """Writes the model and a tokenizer.

    kind: F32, F16 or Q8_0, of the matrices. architecture: to be named instead of the model's own.
    metadata: entries to add or to replace. without: entries to leave out. change: changes the
    tensors before they are written.
    """
    entries = {**_sizes(model.config), **_tokenizer(), **(metadata or {})}
    own = model.config.model_type
    writer = GGUFWriter(path, architecture or own)
    for key, value in entries.items():
        if key not in without:
            _add(writer, key.replace("{}", architecture or own), value)
    tensors = _tensors(model)
    if change is not None:
        change(tensors)
    for name, rows in tensors.items():
        stored = GGMLQuantizationType[kind if rows.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(rows, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_metadata(path: Path, architecture: str, entries: dict[str, Any]) -> Path:
    """Writes what a file of another architecture says about itself, and one tensor."""
    sizes = {
        "context_length": 8192,
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
    }
    writer = GGUFWriter(path, architecture)
    for key, value in {**sizes, **entries}.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in {**_tokenizer(), "tokenizer.ggml.padding_token_id": 0}.items():
        _add(writer, key, value)
    writer.add_tensor("token_embd.weight", np.zeros((len(TOKENS), HIDDEN), "f"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model: transformers.PreTrainedModel, kind: str) -> transformers.PreTrainedModel:
    """The same model with the matrices that a file of this kind holds. Q8_0: 32 numbers share a
    half-precision scale.
    """
    for value in model.parameters():
        if value.ndim != 2 or kind == "F32":
            continue
        if kind == "F16":
            value.data = value.data.half().float()
            continue
        blocks = value.data.view(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        value.data = (torch.round(blocks / scale) * scale.half().float()).view(value.shape)
    return model


def _disturbed(model: transformers.PreTrainedModel) -> Any:
    for value in model.parameters():
        value.data += 0.2 * torch.randn_like(value)
    return model.eval()


def _tensors(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        rows = (
            value.t()
            if isinstance(
                model.get_submodule(name.rpartition(".")[0]), transformers.pytorch_utils.Conv1D
            )
            else value
        )
        for part, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
            if (
                part in name
            ):  # llama.cpp rotates neighbouring coordinates of a head, transformers its two halves
                rows = rows.view(heads, 2, -1, HIDDEN).transpose(1, 2).reshape(rows.shape)
        for theirs, ours in _NAMES.items():
            name = name.replace(f"{theirs}.", f"{ours}.")
        tensors[name] = rows.contiguous().numpy()
    return tensors


def _sizes(config: Any) -> dict[str, Any]:
    sizes = {
        "{}.context_length": LENGTH,
        "{}.embedding_length": HIDDEN,
        "{}.block_count": config.num_hidden_layers,
        "{}.attention.head_count": HEADS,
    }
    if config.model_type == "gpt2":
        return {
            **sizes,
            "{}.feed_forward_length": 4 * HIDDEN,
            "{}.attention.layer_norm_epsilon": EPS,
        }
    return {
        **sizes,
        "{}.feed_forward_length": INNER,
        "{}.attention.head_count_kv": KEY_HEADS,
        "{}.attention.layer_norm_rms_epsilon": EPS,
        "{}.rope.freq_base": THETA,
        "{}.rope.dimension_count": HIDDEN // HEADS,
        "{}.vocab_size": len(TOKENS),
    }


def _tokenizer() -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [
            3 if token.startswith("<|") else 1 for token in TOKENS
        ],  # 3: control
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
