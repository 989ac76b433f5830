"""Checks a compiled simulator against torch.autograd on the same weights, in float64.

The reference is the auxiliary model's own code (rebuilt from its transformers config),
differentiated by torch.autograd and updated by the simulator's rule (`autograd_rule.py`). A source
without such a config is checked against the compiled first forward pass under autograd instead,
which `compile` compared with the model itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tintc.compiler.autograd_rule import rule_of, summed_loss
from tintc.compiler.frontend.compiled import architecture
from tintc.compiler.frontend.messages import listed
from tintc.compiler.frontend.model_checks import build_without_weights
from tintc.ir.dialect import is_tint
from tintc.ir.errors import SourceError, UsageError
from tintc.ir.facts import ModelFacts
from tintc.ir.inputs import is_models_own
from tintc.ir.node_meta import info
from tintc.ir.ops.island import island_forward
from tintc.runtime.simulator import Simulator

TOLERANCE = 1e-9  # relative to the largest logit, and to the largest weight of a parameter
# Where the reference itself rounds to float32, as many models do inside norms, softmax and rotary
# tables: random ones differ by 1e-6.
ROUNDED_TOLERANCE = 1e-5


@dataclass(frozen=True)
class UpdateError:
    """Updates W_after - W_before of some parameters, taken as one vector, against the exact ones.

    exact_norm, norm, difference_norm: Euclidean norms of exact update, found update and their
    difference. dot: exact . found.
    worst: largest difference relative to the parameter's largest weight or the largest exact update
    of any, whichever is larger.
    """

    name: str
    exact_norm: float
    norm: float
    difference_norm: float
    dot: float
    worst: float

    @property
    def cosine(self) -> float | None:
        """None where either update is zero."""
        return self.dot / (self.exact_norm * self.norm) if self.exact_norm and self.norm else None

    @property
    def relative_error(self) -> float | None:
        """|found - exact| / |exact|; None where the exact update is zero."""
        return self.difference_norm / self.exact_norm if self.exact_norm else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cosine": self.cosine, "relative_error": self.relative_error}


@dataclass(frozen=True)
class Verification:
    """agrees: to `tolerance`, initial logits are the model's, and final logits are the model's
    under the weights that the simulator found (updated_logits_error); and the updates together
    point where the exact ones do (a positive cosine; not asked of the other loss gradients); with
    an exact config, final logits and all updates are autograd's too. islands: modules whose
    gradient is torch's own, whatever the config approximates."""

    reference: str
    exact: bool
    agrees: bool
    tolerance: float
    initial_logits_error: float
    logits_error: float
    updated_logits_error: float
    updates: list[UpdateError]
    islands: tuple[str, ...] = ()
    facts: ModelFacts = field(default_factory=ModelFacts)

    def layers(self) -> list[UpdateError]:
        """The same figures for each block as a whole, and for what stands outside of blocks."""
        groups: dict[str, list[UpdateError]] = {}
        for update in self.updates:
            numbered = re.match(r".*?\.\d+(?=\.)", update.name)
            place = numbered.group() if numbered else update.name.rpartition(".")[0]
            if self.facts.block_parts:
                block, _ = self.facts.place(update.name)
                place = f"block {block}" if block else place
            groups.setdefault(place, []).append(update)
        return [_total(name, parts) for name, parts in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        names = (
            "reference",
            "exact",
            "agrees",
            "tolerance",
            "initial_logits_error",
            "logits_error",
            "updated_logits_error",
        )
        fields = {name: getattr(self, name) for name in names}
        return {
            **fields,
            **({"islands": list(self.islands)} if self.islands else {}),
            "layers": [u.to_dict() for u in self.layers()],
            "updates": [u.to_dict() for u in self.updates],
        }


def _total(name: str, parts: list[UpdateError]) -> UpdateError:
    return UpdateError(
        name,
        exact_norm=math.hypot(*(p.exact_norm for p in parts)),
        norm=math.hypot(*(p.norm for p in parts)),
        difference_norm=math.hypot(*(p.difference_norm for p in parts)),
        dot=sum(p.dot for p in parts),
        worst=max(p.worst for p in parts),
    )


def verify(simulator: Simulator, *, tokens: int = 64, seed: int = 0) -> Verification:
    """Runs one random sequence, half of it trained, through the simulator and through autograd.
    simulator: in float64.

    Raises UsageError if `tokens` does not fit the model or the simulator is not in float64.
    """
    if simulator.dtype != torch.float64:
        raise UsageError(
            f"the simulator is in {simulator.dtype}; expected torch.float64: call .double() or "
            "load with dtype=torch.float64"
        )
    simulator.check_has_numbers()
    limit = simulator.program.facts.longest
    if tokens < 2 or (limit is not None and tokens > limit):
        raise UsageError(f"tokens is {tokens}; expected 2 to {limit or 'any number'}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(simulator.program.facts.vocab_size, (1, tokens), generator=generator)
    trained = max(2, tokens // 2)
    train_mask = (torch.arange(tokens) < trained).long()[None]
    reference, forward = _reference(simulator)
    before = {
        name: tensor.detach().clone()
        for name, tensor in simulator.prefix.tensors().items()
        if is_models_own(name)
    }
    after = _descend(simulator, forward, before, ids, trained)
    with torch.inference_mode():
        with Rounding() as rounding:
            initial = forward(before, ids)
        final = forward(after, ids)
        out = simulator(ids, train_mask, return_initial=True)
        found = simulator.updated_state_dict(ids, train_mask)
        under_found = forward({name: found[name] for name in before}, ids)
    assert out.initial_logits is not None
    names = _trained_parameters(simulator)
    floor = torch.stack([(after[name] - before[name]).abs().max() for name in names]).max()
    updates = [_compare(name, before[name], after[name], found[name], floor) for name in names]
    errors = (
        _relative(out.initial_logits, initial),
        _relative(out.logits, final),
        _relative(out.logits, under_found),
    )
    exact, tolerance = simulator.config.is_exact, ROUNDED_TOLERANCE if rounding.found else TOLERANCE
    agrees = errors[0] <= tolerance and errors[2] <= tolerance
    if (
        simulator.config.loss_gradient == "softmax"
    ):  # an approximation of the true gradient still descends
        agrees = agrees and (_total("all", updates).cosine or 0.0) > 0
    if exact:
        agrees = (
            agrees
            and errors[1] <= tolerance
            and all(update.worst <= tolerance for update in updates)
        )
    islands = tuple(
        dict.fromkeys(
            info(node).module or "the model"
            for node in simulator.program.graph.nodes
            if is_tint(node, island_forward)
        )
    )
    facts = simulator.program.facts
    return Verification(reference, exact, agrees, tolerance, *errors, updates, islands, facts)


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether float64 values are rounded to a narrower type."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        narrow = isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64
        self.found |= narrow and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        return out


Forward = Callable[[dict[str, Tensor], Tensor], Tensor]


def _reference(simulator: Simulator) -> tuple[str, Forward]:
    """(what it is, weights and ids -> logits)."""
    config: dict[str, Any] | None = simulator.source.get("config")
    if config is None:
        module = _FirstForward(Simulator(simulator.program, simulator.prefix.tensors()))
        return (
            "autograd through the compiled first forward pass",
            lambda weights, ids: torch.func.functional_call(
                module,
                {f"simulator.prefix.{name}": tensor for name, tensor in weights.items()},
                (ids,),
            ),
        )
    model, aliases = _rebuilt(config, simulator), simulator.program.aliases

    def forward(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        tied = {alias: weights[name] for alias, name in aliases.items()}
        out: Any = torch.func.functional_call(
            model, {**weights, **tied}, (ids,), {"use_cache": False}, tie_weights=False
        )
        logits: Tensor = out.logits
        return logits

    return f"autograd through {type(model).__name__}", forward


def _rebuilt(config: dict[str, Any], simulator: Simulator) -> nn.Module:
    """The model that a config describes, without numbers. Raises SourceError for a config that is
    not that of the simulator's weights: whoever wrote the artifact wrote it, too.
    """
    kind = str(config.get("model_type"))
    described = architecture(config, kind)
    model = build_without_weights(described, kind).double()
    held, aliases = simulator.prefix.tensors(), simulator.program.aliases
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if name not in aliases and (name not in held or held[name].shape != parameter.shape)
    ]
    if wrong:
        raise SourceError(
            f"the config of {kind} describes other weights than the simulator has: "
            f"{listed(wrong)}; compile the model again"
        )
    return model


class _FirstForward(nn.Module):
    def __init__(self, simulator: Simulator) -> None:
        super().__init__()
        self.simulator = simulator

    def forward(self, ids: Tensor) -> Tensor:
        return self.simulator.predict_initial(ids)


def _trained_parameters(simulator: Simulator) -> list[str]:
    return list(
        dict.fromkeys(
            slot.parameter for slot in simulator.program.layout.prefix.values() if slot.trainable
        )
    )


def _descend(
    simulator: Simulator, forward: Forward, before: dict[str, Tensor], ids: Tensor, trained: int
) -> dict[str, Tensor]:
    """All weights after the steps of the simulator's rule, by torch.autograd."""
    rule = rule_of(simulator)
    weights = {n: before[n].detach().requires_grad_() for n in _trained_parameters(simulator)}
    state = rule.start(weights)
    for _ in range(simulator.config.steps):
        logits = forward({**before, **weights}, ids[:, :trained])
        weights = rule.step(summed_loss(logits[0, :-1], ids[0, 1:trained]), weights, state)
    return {**before, **{name: weight.detach() for name, weight in weights.items()}}


def _compare(name: str, before: Tensor, exact: Tensor, found: Tensor, floor: Tensor) -> UpdateError:
    truth, update = (exact - before).flatten(), (found - before).flatten()
    difference = update - truth
    # A new bias may be all zero, and the exact update of a key's bias is: the largest update of all
    # is the floor.
    scale = torch.maximum(before.abs().max(), floor).clamp(min=1e-300)
    return UpdateError(
        name,
        exact_norm=float(truth.norm()),
        norm=float(update.norm()),
        difference_norm=float(difference.norm()),
        dot=float(truth @ update),
        worst=float(difference.abs().max() / scale),
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
