"""What onnxruntime-genai needs to know of a pair's `decode.onnx`: its `genai_config.json`.

Its own inputs are ids, mask, positions, keys and values. Updates are the caller's:
`generator.set_model_input(name, array)` for each output of `adapt.onnx`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from tintc.compiler.onnx.decoding import Cached
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.attention import attention_forward
from tintc.runtime.onnx_pair import DECODE, PAST_VALUE, PRESENT
from tintc.runtime.simulator import Simulator

GENAI_CONFIG = "genai_config.json"
_LONG = 2**20  # positions, of a model that has no last one


def genai_config(simulator: Simulator, cached: Collection[Cached]) -> dict[str, Any] | None:
    """None where that library has no words for the model: it knows keys and values of one shape in
    every layer, no biases of scores, float32 and float16, and texts with an end token.
    """
    tokenizer, facts = simulator.tokenizer, simulator.program.facts
    end = getattr(tokenizer, "eos_token_id", None)
    shapes = {(each.heads, each.width) for each in cached}
    layers = len(cached) // 2
    names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    if (
        end is None
        or len(shapes) != 1
        or [each.name for each in cached] != names
        or simulator.dtype not in (torch.float32, torch.float16)
    ):
        return None
    ((groups, width),) = shapes
    heads = _heads(simulator)
    decoder = {
        "filename": DECODE,
        "head_size": width,
        "hidden_size": facts.hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "session_options": {"provider_options": []},
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            **{f"past_{part}_names": f"{PAST_VALUE}%d.{part}" for part in ("key", "value")},
        },
        "outputs": {
            "logits": "logits",
            **{f"present_{part}_names": f"{PRESENT}%d.{part}" for part in ("key", "value")},
        },
    }
    other = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "pad")}
    model = {
        "type": "decoder",
        "vocab_size": facts.vocab_size,
        "context_length": facts.longest or _LONG,
        "eos_token_id": end,
        **{f"{name}_token_id": end if token is None else token for name, token in other.items()},
        "decoder": decoder,
    }
    search = {
        "max_length": facts.longest or _LONG,
        "do_sample": False,
        "past_present_share_buffer": False,
    }
    return {"model": model, "search": search}


def _heads(simulator: Simulator) -> int:
    """Of queries."""
    nodes = simulator.program.graph.nodes
    return next(int(argument(n, "heads")) for n in nodes if is_tint(n, attention_forward))
