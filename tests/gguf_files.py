"""Tiny models, written to GGUF files as llama.cpp's converter writes them. Needs the package gguf."""

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
TOKENS = ["<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
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
    return _disturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**values, **config})))


def gpt2() -> transformers.GPT2LMHeadModel:
    """A random GPT-2."""
    sizes = {"vocab_size": len(TOKENS), "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH}
    config = transformers.GPT2Config(**sizes, layer_norm_epsilon=EPS, bos_token_id=0, eos_token_id=1)
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

    kind: F32, F16 or Q8_0, of the matrices. architecture: to be named instead of the model's own. metadata: entries to add or to
    replace. without: entries to leave out. change: changes the tensors before they are written.
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


def rounded(model: transformers.PreTrainedModel, kind: str) -> transformers.PreTrainedModel:
    """The same model with the matrices that a file of this kind holds. Q8_0: 32 numbers share a half-precision scale."""
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
        rows = value.t() if isinstance(model.get_submodule(name.rpartition(".")[0]), transformers.pytorch_utils.Conv1D) else value
        for part, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
            if part in name:  # llama.cpp rotates neighbouring coordinates of a head, transformers its two halves
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
        return {**sizes, "{}.feed_forward_length": 4 * HIDDEN, "{}.attention.layer_norm_epsilon": EPS}
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
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in TOKENS],  # 3: control
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
