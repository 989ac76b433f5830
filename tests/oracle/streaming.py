"""TINT.md section 8 by autograd and torch.optim: one stream after another, window by window.

It shares no code with tintc. Windows are slices of a text; with `keys="cache"` the Hugging Face
model's own cache holds what earlier windows left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR
from transformers import DynamicCache

from tests.oracle.reference import approximated, constant_probabilities, surrogate_loss
from tests.oracle.rules import Rule, schedule_factor

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each layer


@dataclass
class Streamed:
    """losses: of each document its targets'. weights: all after the last chunk."""

    losses: list[Tensor]
    weights: dict[str, Tensor]


class StreamRule(Rule):
    """The schedule starts anew with each chunk; all other state goes on."""

    def begin_chunk(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self._scheduler = LambdaLR(self._optimizer, lambda k: schedule_factor(self._config, k))


def streamed(
    model: Any,
    config: Any,
    documents: list[Tensor],
    trained: list[str],
    *,
    chunk: int,
    context: int,
    keys: str = "recompute",
    reset: str = "document",
    rms: dict[str, Tensor] | None = None,
    longest: int | None = None,
) -> Streamed:
    """The documents of one row, in order. longest: tokens of the model's longest sequence."""
    changed = approximated(model, config)
    first = {name: value.detach().clone() for name, value in changed.named_parameters()}
    start = {name: first[name] for name in trained}
    rule, weights, losses = StreamRule(changed, start, config, rms), dict(first), []
    for ids in documents:
        if reset == "document":
            rule, weights = StreamRule(changed, start, config, rms), dict(first)
        reader = _Cached(changed, context, longest) if keys == "cache" else _Anew(changed, context)
        found = []
        for s in range(1, len(ids), chunk):
            e = min(s + chunk, len(ids))
            rule.begin_chunk()
            reader.begin(weights, ids, s, e)
            for step in range(config.steps):
                leaves = {n: weights[n].detach().requires_grad_() for n in trained}
                with constant_probabilities(config.attention_gradient == "value"):
                    logits = reader.logits({**weights, **leaves}, ids, s, e)
                if step == 0:
                    found.append(F.cross_entropy(logits, ids[s:e], reduction="none").detach())
                total = surrogate_loss(logits, ids[s:e], config.loss_gradient)
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                weights |= rule.step(dict(zip(trained, gradients, strict=True)))
            reader.end()
        losses.append(torch.cat(found))
    return Streamed(losses, weights)


class _Anew:
    """Keys and values of the context are computed in every window, whose positions count from 0."""

    def __init__(self, model: nn.Module, context: int) -> None:
        self._model, self._context = model, context

    def begin(self, weights: dict[str, Tensor], ids: Tensor, s: int, e: int) -> None:
        pass

    def logits(self, weights: dict[str, Tensor], ids: Tensor, s: int, e: int) -> Tensor:
        window = ids[max(0, s - 1 - self._context) : e - 1]
        out = functional_call(self._model, weights, (window[None],), {"use_cache": False})
        logits: Tensor = out.logits[0]
        return logits[len(window) - (e - s) :]

    def end(self) -> None:
        pass


class _Cached(_Anew):
    """They stay as they were in the first forward pass of their chunk."""

    def __init__(self, model: nn.Module, context: int, longest: int | None) -> None:
        super().__init__(model, context)
        self._longest = longest
        self._past: Pairs = []
        self._fresh: Pairs | None = None
        self._position = 0

    def begin(self, weights: dict[str, Tensor], ids: Tensor, s: int, e: int) -> None:
        if self._longest is not None and self._position + e - s > self._longest:
            again = ids[max(0, s - 1 - self._context) : s - 1]
            self._past, self._position = [], 0
            if len(again):
                self._run(weights, again)
                self.end()

    def logits(self, weights: dict[str, Tensor], ids: Tensor, s: int, e: int) -> Tensor:
        return self._run(weights, ids[s - 1 : e - 1])

    def _run(self, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        cache = DynamicCache()
        for layer, (k, v) in enumerate(self._past):
            cache.update(k, v, layer)
        before = self._past[0][0].shape[-2] if self._past else 0
        positions = torch.arange(self._position, self._position + len(tokens))
        options = {
            "cache": cache,
            "use_cache": True,
            "position_ids": positions[None],
            "attention_mask": _looks(before, len(tokens)),
        }
        logits: Tensor = functional_call(self._model, weights, (tokens[None],), options).logits[0]
        if self._fresh is None:
            self._fresh = [(layer.keys.detach(), layer.values.detach()) for layer in cache.layers]
        return logits

    def end(self) -> None:
        fresh = self._fresh or []
        before = self._past[0][0].shape[-2] if self._past else 0
        self._position += fresh[0][0].shape[-2] - before
        kept = -self._context if self._context else fresh[0][0].shape[-2]
        self._past = [(k[:, :, kept:], v[:, :, kept:]) for k, v in fresh]
        if not self._context:
            self._past = []
        self._fresh = None


def _looks(before: int, tokens: int) -> Tensor:
    """(1, 1, T, C) for models whose attention adds the mask to its scores."""
    allowed = torch.ones(tokens, before + tokens, dtype=torch.bool).tril(before)
    least = torch.finfo(torch.float64).min
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, least)[None, None]
