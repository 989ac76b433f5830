"""The inner rule by torch.autograd, as one would write it by hand: for `verify`, and for the loops
that simulators are compared with. TINT.md section 7.

    g = dL/dW, L the sum of the targets' cross-entropies; clip, normalize, momentum or optimizer;
    W <- W - eta x schedule x lr_scale x that; then decay; then max_drift

It shares nothing with what simulators compute: their rule is operators of a graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument, is_tint
from tintc.ir.inputs import statistics_name
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.precision import wide
from tintc.ir.selection import Selection
from tintc.runtime.simulator import Simulator

Weights = dict[str, Tensor]
_NEWTON_SCHULZ, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of torch.optim.Muon
_CLIP_EPS, _RMS_EPS, _MUON_EPS = 1e-6, 1e-9, 1e-7


def summed_loss(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    """L, in at least float32."""
    return F.cross_entropy(wide(logits_KV), targets_K, reduction="sum")


@dataclass
class State:
    """Of one sequence. steps: done so far. chunk: of them before this chunk of a stream, where the
    schedule starts anew. before: W_0. first: v, or adam's first moment; second: its second.
    """

    before: Weights
    steps: int = 0
    chunk: int = 0
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)


class InnerRule:
    """The rule of a config, for weights by their names in the model.

    matrices: weights of linear layers, which `muon` makes orthogonal; True where one is stored as
    (in, out). aliases: further names of tied weights, as a program has them. rms: root mean squares
    of gradients, for `rms`. What no gradient reaches stays as it is.
    """

    def __init__(
        self,
        config: SimulatorConfig,
        matrices: Mapping[str, bool] | None = None,
        aliases: Mapping[str, str] | None = None,
        rms: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self._selection = Selection(config, aliases or {})
        self._matrices = (matrices or {}) if config.optimizer == "muon" else {}
        self._rms = rms or {}

    def start(self, weights: Weights) -> State:
        """For a new sequence. weights: W_0, which is kept, not copied."""
        return State(weights)

    def scale(self, name: str) -> float:
        """The factor of a weight's learning rate."""
        return self._selection.factor(name)

    def begin_chunk(self, state: State) -> None:
        """The schedule starts anew; all else goes on."""
        state.chunk = state.steps

    @torch.no_grad()
    def step(self, loss: Tensor, weights: Weights, state: State) -> Weights:
        """New weights, which ask for gradients as the old ones do."""
        moved = {
            name: self._held_back(name, torch.sub(weights[name], direction, alpha=rate), state)
            for name, direction, rate in self._directions(loss, weights, state)
        }
        return {name: moved.get(name, old).requires_grad_() for name, old in weights.items()}

    @torch.no_grad()
    def step_in_place(self, loss: Tensor, weights: Weights, state: State) -> None:
        """The same on the weights themselves; W_0 must be others, if the rule looks back at it."""
        for name, direction, rate in self._directions(loss, weights, state):
            self._held_back(name, weights[name].sub_(direction, alpha=rate), state)

    def _directions(
        self, loss: Tensor, weights: Weights, state: State
    ) -> Iterator[tuple[str, Tensor, float]]:
        """Of each weight what is subtracted, and how many times. A gradient is let go of as soon as
        its user is done with it.
        """
        config = self.config
        scales = {name: self.scale(name) for name in weights}
        names = [name for name in weights if scales[name] != 0]
        found = torch.autograd.grad(loss, [weights[name] for name in names], allow_unused=True)
        gradients = {n: g for n, g in zip(names, found, strict=True) if g is not None}
        del found
        eta = config.inner_lr * config.schedule_factor(state.steps - state.chunk)
        state.steps += 1
        share = None
        if config.clip_norm is not None:
            total = torch.stack([_norm(g) for g in gradients.values()]).norm()
            share = (config.clip_norm / (total + _CLIP_EPS)).clamp(max=1)
        for name in list(gradients):
            g = gradients.pop(name)
            direction = self._direction(name, g if share is None else g * share.to(g.dtype), state)
            del g
            yield name, direction, eta * scales[name]

    def _direction(self, name: str, g: Tensor, state: State) -> Tensor:
        config = self.config
        if config.normalize == "weight":
            g = g / (_norm(g) / math.sqrt(g.numel()) + _RMS_EPS).to(g.dtype)
        if config.optimizer == "adam":
            return self._adam(name, g, state)
        if config.optimizer == "rms":
            return g / (self._rms[name] + config.eps)
        if config.momentum:
            v = self._state(state.first, name, g).mul_(config.momentum).add_(g)
            g = torch.add(g, v, alpha=config.momentum) if config.nesterov else v
        if name in self._matrices:
            return orthogonal(g.mT).mT if self._matrices[name] else orthogonal(g)
        return g

    def _adam(self, name: str, g: Tensor, state: State) -> Tensor:
        b1, b2 = self.config.betas
        first = self._state(state.first, name, g).lerp_(g, 1 - b1)
        second = self._state(state.second, name, g).mul_(b2).addcmul_(g, g, value=1 - b2)
        spread = (second / (1 - b2**state.steps)).sqrt_().add_(self.config.eps)
        return (first / (1 - b1**state.steps)).div_(spread)

    def _state(self, of: Weights, name: str, g: Tensor) -> Tensor:
        """0 before the first step."""
        if name not in of:
            of[name] = torch.zeros_like(g)
        return of[name]

    def _held_back(self, name: str, weight: Tensor, state: State) -> Tensor:
        """Decay and the limit of the drift, in place on what was just moved."""
        config = self.config
        if config.decay:
            weight.lerp_(state.before[name], config.decay)
        if config.max_drift is not None:
            before = state.before[name].detach()
            drift, own = weight - before, _norm(before)
            share = (config.max_drift * own / _norm(drift)).clamp(max=1).nan_to_num(1)
            share = torch.where(own == 0, torch.ones_like(share), share)
            weight.copy_(torch.where(share < 1, before + drift * share.to(drift.dtype), weight))
        return weight


def _norm(value: Tensor) -> Tensor:
    """Frobenius norm, in at least float32."""
    norm: Tensor = torch.linalg.vector_norm(wide(value))
    return norm


def orthogonal(g: Tensor) -> Tensor:
    """Newton-Schulz iterations on g (out, in) over its norm, times sqrt(max(1, out / in)): the
    formula of torch.optim.Muon in g's own dtype.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = g.shape[0] > g.shape[1]
    x = g.mT if tall else g
    x = x / _norm(x).clamp(min=_MUON_EPS).to(x.dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x) * math.sqrt(max(1.0, g.shape[0] / g.shape[1]))


def matrices(simulator: Simulator) -> dict[str, bool]:
    """Weights of linear layers; True where one is stored as (in, out)."""
    weights = (
        argument(node, "weight")
        for node in simulator.program.graph.nodes
        if is_tint(node, linear_forward)
    )
    reads = {weight for weight in weights if is_tint(weight, prefix)}
    return {
        parameter: bool(argument(read, "transpose"))
        for read in reads
        if (parameter := info(argument(read, "parameter")).parameter) is not None
    }


def rule_of(simulator: Simulator) -> InnerRule:
    """The rule that a simulator follows, at the rate that it has now."""
    tensors = simulator.prefix.tensors()
    rms = {
        name: tensors[gathered]
        for name in tensors
        if (gathered := statistics_name(name)) in tensors
    }
    config = dataclasses.replace(simulator.config, inner_lr=float(simulator.inner_lr.detach()))
    return InnerRule(config, matrices(simulator), simulator.program.aliases, rms)
