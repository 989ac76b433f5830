"""The inner rules of TINT.md section 7 by torch.optim, and written out where that has no
counterpart.

It shares no code with tintc and reads a config by field names only. A weight is a whole parameter
of the model. W_0: the weights as they were given; g: a step's gradient, summed over positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

Weights = dict[str, Tensor]
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Rule:
    """Steps of one sequence: clip, normalize, momentum or optimizer, times eta x schedule x
    lr_scale, then decay, then max_drift.

    model: whose modules say which weights are matrices of linear layers. weights: W_0 of what is
    trained. rms: root mean squares of the gradients, for `rms`.
    """

    def __init__(
        self, model: nn.Module, weights: Weights, config: Any, rms: Weights | None = None
    ) -> None:
        self._config, self._rms = config, rms or {}
        scales = {name: lr_scale(config, name) for name in weights}
        self._before = {n: w.detach().clone() for n, w in weights.items() if scales[n] != 0}
        self._now = {n: nn.Parameter(w.clone()) for n, w in self._before.items()}
        self._orthogonal = _matrices(model, self._now) if config.optimizer == "muon" else {}
        self._buffers: Weights = {}
        if not self._now:
            return
        groups = [
            {
                "params": [weight],
                "lr": abs(config.inner_lr * scales[name]),
                "maximize": config.inner_lr * scales[name] < 0,
                **({} if config.optimizer == "adam" else self._momentum(name)),
            }
            for name, weight in self._now.items()
        ]
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(groups, betas=tuple(config.betas), eps=config.eps)
            if config.optimizer == "adam"
            else torch.optim.SGD(groups)
        )
        self._scheduler = LambdaLR(self._optimizer, lambda k: schedule_factor(config, k))

    def step(self, gradients: dict[str, Tensor | None]) -> Weights:
        """The weights after one more step; what no gradient reaches stays."""
        for name, weight in self._now.items():
            weight.grad = None if (found := gradients[name]) is None else found.detach().clone()
        reached = {name: w for name, w in self._now.items() if w.grad is not None}
        if not reached:
            return self.weights()
        if self._config.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(reached.values()), self._config.clip_norm)
        for name, weight in reached.items():
            weight.grad = self._direction(name, weight.grad)
        self._optimizer.step()
        self._scheduler.step()
        with torch.no_grad():
            for name, weight in reached.items():
                weight.copy_(self._held_back(weight, self._before[name]))
        return self.weights()

    def weights(self) -> Weights:
        """All that is trained, as it is now."""
        return {name: weight.detach().clone() for name, weight in self._now.items()}

    def _momentum(self, name: str) -> dict[str, Any]:
        """Muon's own momentum is inside its direction."""
        if name in self._orthogonal:
            return {}
        return {"momentum": self._config.momentum, "nesterov": self._config.nesterov}

    def _direction(self, name: str, gradient: Any) -> Tensor:
        """What the optimizer gets as a weight's gradient."""
        g: Tensor = gradient
        if self._config.normalize == "weight":
            g = g / (g.norm() / math.sqrt(g.numel()) + 1e-9)
        if self._config.optimizer == "rms":
            g = g / (self._rms[name] + self._config.eps)
        if name in self._orthogonal:
            mu = self._config.momentum
            v = self._buffers[name] = mu * self._buffers.get(name, torch.zeros_like(g)) + g
            v = g + mu * v if self._config.nesterov else v
            g = muon_direction(v.mT).mT if self._orthogonal[name] else muon_direction(v)
        return g

    def _held_back(self, weight: Tensor, before: Tensor) -> Tensor:
        weight = weight + self._config.decay * (before - weight)
        limit = self._config.max_drift
        if limit is None or not bool(before.any()):
            return weight
        drift, allowed = weight - before, limit * before.norm()
        return before + drift * (allowed / drift.norm()) if drift.norm() > allowed else weight


def lr_scale(config: Any, name: str) -> float:
    """The factor of the last pattern that matches."""
    found = [factor for pattern, factor in config.lr_scale if fnmatchcase(name, pattern)]
    return float(found[-1]) if found else 1.0


def schedule_factor(config: Any, k: int) -> float:
    """The factor of eta at step k of a call. LambdaLR also asks for the step after the last."""
    n = config.steps
    if k >= n:
        return 0.0
    if isinstance(config.schedule, str):
        known = {
            "constant": 1.0,
            "linear": 1 - k / n,
            "cosine": 0.5 * (1 + math.cos(math.pi * k / n)),
        }
        return known[config.schedule]
    return float(config.schedule[k])


def _matrices(model: nn.Module, names: Iterable[str]) -> dict[str, bool]:
    """Matrices of linear layers, the head left out; True where they are stored transposed."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules, found = dict(model.named_modules()), {}
    for name in names:
        path, _, own = name.rpartition(".")
        owner = modules[path]
        if own == "weight" and isinstance(owner, (nn.Linear, Conv1D)) and owner is not head:
            found[name] = isinstance(owner, Conv1D)
    return found


def muon_direction(g: Tensor) -> Tensor:
    """Five quintic Newton-Schulz iterations on g (out, in) over its norm, times
    sqrt(max(1, out / in)).

    Formula of torch.optim.Muon with adjust_lr_fn="original", which itself rounds to bfloat16.
    """
    a, b, c = _NEWTON_SCHULZ
    out, into = g.shape
    x = g if out <= into else g.T
    x = x / max(float(x.norm()), 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if out <= into else x.T) * math.sqrt(max(1.0, out / into))


def root_mean_squares(gradients: Iterable[Weights]) -> Weights:
    """Elementwise root of the mean over chunks of g^2."""
    total: Weights = {}
    count = 0
    for chunk in gradients:
        count += 1
        total = {name: total.get(name, 0) + g**2 for name, g in chunk.items()}
    return {name: (value / count).sqrt() for name, value in total.items()}


def chunk_gradients(
    model: Any, names: list[str], ids: Tensor, *, targets: int, context: int
) -> Iterator[Weights]:
    """The summed gradient of each chunk of a text (N,) under the weights as they are.

    Chunk i holds the targets s .. e - 1, the first from s = 1, and sees tokens
    max(0, s - 1 - context) .. e - 2 (TINT.md section 8).
    """
    weights = {name: model.get_parameter(name).detach().requires_grad_() for name in names}
    for start in range(1, len(ids), targets):
        end = min(start + targets, len(ids))
        window = ids[max(0, start - 1 - context) : end - 1]
        out = functional_call(model, weights, (window[None],), {"use_cache": False})
        scores = out.logits[0, -(end - start) :]
        loss = F.cross_entropy(scores, ids[start:end], reduction="sum")
        found = torch.autograd.grad(loss, list(weights.values()))
        yield dict(zip(names, found, strict=True))
