"""A simulator against the fine-tuning loop that one would write by hand: the loop, the clock, and
what they are compared by.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tintc.compiler.autograd_rule import InnerRule, summed_loss
from tintc.compiler.frontend.capture import LogitsOnly
from tintc.evaluate.speed.workload import Workload
from tintc.ir.builder import outputs
from tintc.runtime.machine import timed
from tintc.runtime.simulator import Simulator

# Largest difference of logits, relative to the largest logit, at which two ways to compute the same
# count as equal.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# In float32, of what training changes in the logits: gradients of random weights are rounded by so
# much. A part of 1.7e-4 was seen with OPT-125M's shape.
ROUNDED_UPDATE = 2e-3

MATMUL_SIZE = {
    "cpu": 2048,
    "cuda": 4096,
}  # of the square matrices whose product shows what a device can do
_MATMULS = 5


class HandWrittenLoop:
    """Ordinary dynamic evaluation with torch.autograd, one sequence after the other:

        W_0 = W;  W_{k+1} = W_k - inner_lr * dL/dW (W_k);  logits = f(x; W_steps)

    or by another rule (`compiler/autograd_rule.py`), with L the sum over the training segment's
    targets, for the parameters `names`, through `torch.func.functional_call`; the model's own
    weights stay. It keeps nothing longer than it needs: no graph outside of training, no gradient
    after its use, no cache, no padding, and of the segment only the tokens that the loss depends on
    (the last one is a target). The loss of half-precision logits is computed in float32.

    model: in eval mode; its `requires_grad` flags are set, on for `names` alone.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], rule: InnerRule) -> None:
        self._model = LogitsOnly(model.requires_grad_(False))
        self._weights = {name: model.get_parameter(name).requires_grad_() for name in names}
        self._rule = rule

    def __call__(self, work: Workload) -> list[Tensor]:
        """Logits (T, V) of each sequence under its own updated weights, or those of its rest."""
        return [self._one(ids_T[None], work) for ids_T in work.ids_BT]

    def updated(self, ids_1T: Tensor, trained: int) -> dict[str, Tensor]:
        """The trained parameters after the last step on one sequence, by their names in the
        model.
        """
        found = self._train(ids_1T[:, :trained])
        return {name: weight.detach() for name, weight in found.items()}

    def _one(self, ids_1T: Tensor, work: Workload) -> Tensor:
        weights = self._train(ids_1T[:, : work.trained])
        with torch.no_grad():
            return self._logits(weights, ids_1T, work.first)[0]

    def _train(self, segment_1S: Tensor) -> dict[str, Tensor]:
        weights, state = self._weights, self._rule.start(self._weights)
        for number in range(self._rule.config.steps):
            loss = self._loss(weights, segment_1S)
            if number == 0:
                weights = self._rule.step(loss, weights, state)
            else:  # these are the loop's own already
                self._rule.step_in_place(loss, weights, state)
        return weights

    def _loss(self, weights: dict[str, Tensor], segment_1S: Tensor) -> Tensor:
        ids = segment_1S[:, :-1]
        logits = self._model(ids) if weights is self._weights else self._logits(weights, ids)
        return summed_loss(logits[0], segment_1S[0, 1:])

    def _logits(self, weights: dict[str, Tensor], ids_1T: Tensor, first: int = 0) -> Tensor:
        named = {f"auxiliary.{name}": weight for name, weight in weights.items()}
        logits: Tensor = functional_call(self._model, named, (ids_1T, first))
        return logits


def updated_parameters(simulator: Simulator) -> list[str]:
    """Names of the auxiliary parameters that the simulator updates, wholly or in part."""
    slots = simulator.program.layout.prefix
    return list(
        dict.fromkeys(slots[slot].parameter for slot in outputs(simulator.program.graph)["updates"])
    )


def relative_difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest difference of two lists of logits over the largest expected one; NaN if there is a
    NaN in either.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    return float(
        difference / torch.stack([b.abs().max() for _, b in pairs]).max().clamp(min=1e-300)
    )


@dataclass(frozen=True)
class Turns:
    """Seconds of two functions that ran in turn, pair by pair."""

    base: list[float]
    other: list[float]

    @property
    def ratios(self) -> list[float]:
        """other / base of each pair."""
        return [b / a for a, b in zip(self.base, self.other, strict=True)]

    def to_dict(self, base: str, other: str) -> dict[str, Any]:
        """Medians, ratios and every time, as JSON values. The ratio is the median of the pairs'
        own, not that of the medians.
        """
        return {
            f"{base}_seconds": statistics.median(self.base),
            f"{other}_seconds": statistics.median(self.other),
            "ratio": statistics.median(self.ratios),
            "ratio_range": [min(self.ratios), max(self.ratios)],
            "ratios": self.ratios,
            f"{base}_times": self.base,
            f"{other}_times": self.other,
        }


Function = Callable[[], object]


def in_turn(
    base: Function,
    other: Function,
    *,
    pairs: int,
    device: str,
    on_pair: Callable[[int], None] = lambda pair: None,
) -> Turns:
    """Times A B A B ... after a call of each that does not count: what else the machine does slows
    both.
    """
    base(), other()
    turns = Turns([], [])
    for pair in range(pairs):
        on_pair(pair)
        turns.base.append(timed(base, device))
        turns.other.append(timed(other, device))
    return turns


def matmul_rates(dtype: torch.dtype, device: str) -> dict[str, float]:
    """FLOP a second of the fastest of some large square products, by what computes them: what this
    device reaches in this process at most.

    `torch.mm`, and `oneDNN` where torch has its kernels for the type: on some processors they beat
    the BLAS behind torch.mm.
    """
    size = matmul_size(device)
    a = torch.randn(size, size, device=device).to(dtype)
    products: dict[str, Function] = {"torch.mm": lambda: torch.mm(a, a)}
    if (
        a.device.type == "cpu"
        and dtype == torch.float32
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], "")
    rates = {}
    with torch.inference_mode():
        for name, product in products.items():
            product()
            rates[name] = 2 * size**3 / min(timed(product, device) for _ in range(_MATMULS))
    return rates


def matmul_size(device: str) -> int:
    """Rows of those matrices."""
    return MATMUL_SIZE[torch.device(device).type]


def variant(simulator: Simulator, optimizations: Sequence[str]) -> Simulator:
    """A simulator with the same parameters, not copies of them, and these optimizations alone."""
    other = copy.copy(simulator)
    other.optimizations = tuple(optimizations)
    return other
