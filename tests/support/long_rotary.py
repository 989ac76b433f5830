"""Small models whose rotary frequencies depend on the length of the call, and what they compute by
Hugging Face code and torch.autograd: a fresh module for every call, since these modules keep the
frequencies of the last one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.oracle.reference import (
    approximated,
    constant_probabilities,
    surrogate_loss,
    trained_names,
)
from tests.oracle.rules import Rule
from tests.support.families import BASE, GROUPED, VOCAB, builder
from tests.support.once import capture_once
from tintc.compiler.casts import no_casts
from tintc.compiler.driver import lower
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

ORIGINAL = 10  # positions that the models were made for
RATE = 0.01
EXACT, PAPER = (SimulatorConfig.preset(p, inner_lr=RATE, steps=2) for p in ("exact", "paper"))
DYNAMIC, LONGROPE = "llama, dynamic", "phi3, longrope"


def _dynamic(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, **more}
    return {"max_position_embeddings": ORIGINAL, "rope_parameters": rope}


def _longrope(turned: int, **more: Any) -> dict[str, Any]:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + 0.1 * i for i in range(turned // 2)],
        "long_factor": [2.0 + 0.7 * i for i in range(turned // 2)],
        **more,
    }
    return {
        "max_position_embeddings": 8 * ORIGINAL,
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": rope,
    }


_OF_8 = {**GROUPED, "hidden_size": 32}  # heads of 8
_PLAIN = {**BASE, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 20}
LONG: dict[str, Callable[..., Any]] = {
    "llama, dynamic": builder("llama", **GROUPED | _dynamic()),
    "phi3, longrope": builder("phi3", **_OF_8 | _longrope(8)),
    "phi3, longrope, part of a head": builder(
        "phi3", **_OF_8 | _longrope(4, partial_rotary_factor=0.5)
    ),
    "gpt_neox, dynamic, part of a head": builder(
        "gpt_neox", **_PLAIN | _dynamic(partial_rotary_factor=0.5)
    ),
    "gemma3, each kind of layer its own": builder(
        "gemma3_text",
        **GROUPED
        | {
            "head_dim": 6,
            "max_position_embeddings": ORIGINAL,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                "full_attention": _dynamic()["rope_parameters"],
            },
        },
    ),
}


def short_simulator(model: nn.Module, config: SimulatorConfig) -> Simulator:
    """One whose tables are looked at up to 64 tokens, which takes less time than 4096."""
    captured = dataclasses.replace(capture_once(model), max_tokens=64)
    return Simulator(lower(captured, config), captured.tensors)


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def first_call(model: nn.Module, weights: dict[str, Tensor], ids_T: Tensor) -> Tensor:
    """(T, V) logits of the module's first call."""
    fresh = copy.deepcopy(model)
    logits: Tensor = functional_call(fresh, weights, (ids_T[None],), {"use_cache": False}).logits[0]
    return logits


def stepped(
    model: nn.Module,
    config: Any,
    ids_T: Tensor,
    train: int,
    targets: Tensor | None = None,
    trained: list[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """((T, V) logits before, (T, V) after) the steps on calls of the first `train` tokens alone.
    targets: (T,) bool, which of these carry loss as targets; default all.
    """
    changed = approximated(model, config)
    weights = {name: value.detach().clone() for name, value in changed.named_parameters()}
    names = trained_names(changed, config) if trained is None else trained
    rule = Rule(changed, {name: weights[name] for name in names}, config, None)
    initial = first_call(changed, weights, ids_T).detach()
    kept = torch.ones(train, dtype=torch.bool) if targets is None else targets[:train]
    for _ in range(config.steps):
        leaves = {name: weights[name].detach().requires_grad_() for name in names}
        with constant_probabilities(config.attention_gradient == "value"):
            logits = first_call(changed, {**weights, **leaves}, ids_T[:train])
        total = surrogate_loss(
            logits[:-1][kept[1:]], ids_T[1:train][kept[1:]], config.loss_gradient
        )
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        weights |= rule.step(dict(zip(names, gradients, strict=True)))
    return initial, first_call(changed, weights, ids_T).detach()


@cache
def model(name: str) -> Any:
    """One of them: do not call it, which changes it."""
    with torch.inference_mode(False):
        return LONG[name]()


@cache
def simulator(name: str, config: SimulatorConfig = EXACT) -> Simulator:
    """Without the reference's casts. Whoever asks first, under inference_mode or not, it is the
    same.
    """
    with torch.inference_mode(False), no_casts():
        own = copy.deepcopy(model(name))
        return short_simulator(own, config)


def trained(batch: int, length: int, train: int) -> Tensor:
    """(B, T): the first tokens of every sequence."""
    return (torch.arange(length) < train).long().expand(batch, -1)
