"""Adapted simulators of tiny models, and the Hugging Face model with the same weights loaded."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.support.every import captured, model_of, simulator_of
from tests.support.families import VOCAB
from tests.support.models import tokens
from tests.support.scenarios import SCENARIOS, Inputs
from tintc.compiler.casts import no_casts
from tintc.compiler.driver import lower
from tintc.ir.config import SimulatorConfig
from tintc.runtime.adapted import Adapted
from tintc.runtime.decoding.form import Form
from tintc.runtime.simulator import Simulator

RATE = 0.02
EXACT = SimulatorConfig.exact(inner_lr=RATE)
CONTEXTS = 3


def context(batch: int = CONTEXTS, length: int = 9, seed: int = 0) -> Inputs:
    """Of unequal lengths, padded on the left; trained on in part."""
    return SCENARIOS["padded_left"](batch, length, VOCAB, seed)


@cache
def adapted_of(
    name: str, form: Form = "auto", config: SimulatorConfig = EXACT, backend: str = "fused"
) -> Adapted:
    """Without the casts of the model's code. Do not change its simulator."""
    with torch.inference_mode(False):
        return simulator_of(name, True, config, backend).adapt(**context(), form=form)


def own_simulator(name: str, config: SimulatorConfig = EXACT, **options: Any) -> Simulator:
    """One that a test may change. It has its model's config, as `tintc.compile` puts it there."""
    graph = captured(name, True)
    described = getattr(model_of(name), "config", None)
    source = {} if described is None else {"config": described.to_dict()}
    tensors = {key: value.detach().clone() for key, value in graph.tensors.items()}
    return Simulator(lower(graph.copy(), config), tensors, source=source, **options)


@cache
def with_config(name: str, form: Form = "auto") -> Adapted:
    """The same as `adapted_of`, of a simulator that knows its model's config."""
    with torch.inference_mode(False):
        return own_simulator(name).adapt(**context(), form=form)


def prompts(rows: int = CONTEXTS, length: int = 12, seed: int = 7) -> tuple[Tensor, Tensor]:
    """(ids, mask) of unequal lengths, padded on the left: the first row is whole."""
    ids = tokens(rows, length, VOCAB - 1, seed) + 1
    sizes = length - torch.tensor([(3 * row) % (length - 1) for row in range(rows)])
    mask = (torch.arange(length) >= length - sizes[:, None]).long()
    return ids * mask, mask


class Loaded:
    """The Hugging Face model with the state dict of each sequence that was adapted to."""

    def __init__(self, name: str, adapted: Adapted) -> None:
        self.models = []
        for index in range(len(adapted)):
            model: Any = copy.deepcopy(model_of(name))
            model.load_state_dict(adapted.state_dict(index))
            self.models.append(model)

    @torch.no_grad()
    def logits(self, index: int, ids: Tensor) -> Tensor:
        """(T, V) of one row without padding, by the whole sequence."""
        with no_casts():
            found: Tensor = self.models[index](ids[None], use_cache=False).logits[0]
        return found

    def generate(self, index: int, ids: Tensor, **options: Any) -> Any:
        """Of one row without padding."""
        with no_casts():
            return self.models[index].generate(ids[None], **options)


def by_chunks(adapted: Adapted, ids: Tensor, mask: Tensor | None, sizes: list[int]) -> Tensor:
    """(R, T, V), a chunk of tokens at a time on one cache; the last sizes are repeated."""
    cached, found, start = None, [], 0
    while start < ids.shape[1]:
        stop = start + sizes[min(len(found), len(sizes) - 1)]
        seen = None if mask is None else mask[:, :stop]
        out = adapted(ids[:, start:stop], seen, cache=cached, use_cache=True)
        cached, start = out.cache, stop
        found.append(out.logits)
    return torch.cat(found, 1)


def rows_apart(found: Tensor, mask: Tensor) -> list[Tensor]:
    """Of each row what stands at tokens that are no padding."""
    return [row[keep.bool()] for row, keep in zip(found, mask, strict=True)]
