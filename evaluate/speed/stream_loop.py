"""Streaming dynamic evaluation as one would write it by hand: the Hugging Face model,
torch.autograd and an inner rule in place, one sequence after another, logits of a chunk's targets
alone.

Legend: B sequences, N tokens of each, C targets of a chunk, L tokens of context.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintc.compiler.autograd_rule import InnerRule
from tintc.runtime.stream_settings import StreamSettings

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each layer


class StreamLoop:
    """Reads B texts chunk by chunk, each with its turn; all of them change the one model's weights,
    which costs what a model for each would.

    keys: `recompute`, or `cache`: keys and values of earlier chunks are kept, without gradients.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], rule: InnerRule, settings: StreamSettings,
        batch: int,
    ) -> None:  # fmt: skip
        self._model: Any = model.requires_grad_(False).eval()
        self._weights = {name: model.get_parameter(name).requires_grad_() for name in names}
        self._rule, self._settings = rule, settings
        before = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._states = [rule.start(before) for _ in range(batch)]
        self._caches: list[Pairs] = [[] for _ in range(batch)]
        self._of_cache = _cache_argument(model)

    def step(self, ids_BN: Tensor, s: int) -> list[Tensor]:
        """Losses (n,) of the targets s .. s + C - 1 of each text; then trains on them."""
        e = min(s + self._settings.chunk, ids_BN.shape[1])
        return [self._one(row, ids_BN[row], s, e) for row in range(len(ids_BN))]

    def _one(self, row: int, ids_N: Tensor, s: int, e: int) -> Tensor:
        state, losses, keys = self._states[row], [], []
        self._rule.begin_chunk(state)
        for _ in range(self._rule.config.steps):
            logits, fresh = self._logits(row, ids_N, s, e)
            each = F.cross_entropy(logits, ids_N[s:e], reduction="none")
            losses.append(each.detach())
            keys.append(fresh)
            self._rule.step_in_place(each.sum(), self._weights, state)
        self._caches[row] = keys[0]
        return losses[0]

    def _logits(self, row: int, ids_N: Tensor, s: int, e: int) -> tuple[Tensor, Pairs]:
        keep = {"logits_to_keep": e - s}
        if self._settings.keys == "recompute":
            window = ids_N[max(0, s - 1 - self._settings.context) : e - 1]
            return self._last(self._model(window[None], use_cache=False, **keep), e - s), []
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (k, v) in enumerate(self._caches[row]):
            cache.update(k, v, layer)
        positions = torch.arange(s - 1, e - 1, device=ids_N.device)[None]
        given = {self._of_cache: cache, "use_cache": True, "position_ids": positions, **keep}
        out = self._model(ids_N[None, s - 1 : e - 1], **given)
        last = slice(-self._settings.context or None, None)
        fresh = [(x.keys[:, :, last].detach(), x.values[:, :, last].detach()) for x in cache.layers]
        return self._last(out, e - s), fresh if self._settings.context else []

    @staticmethod
    def _last(out: Any, count: int) -> Tensor:
        logits: Tensor = out.logits[0]
        return logits[-count:]


def _cache_argument(model: nn.Module) -> str:
    """transformers has renamed it."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"
