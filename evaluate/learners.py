"""Who is compared: the unmodified model, true dynamic evaluation by torch.autograd, and a
simulator.

All of them run the same captured forward pass, which compilation checked against the model itself,
with the same masks and positions; they differ in where the updated weights come from. Legend: B
sequences, T tokens, K kept positions, V vocabulary.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tintc.compiler.autograd_rule import InnerRule, matrices, summed_loss
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.ops.head import token_losses
from tintc.runtime.batch import Batch
from tintc.runtime.masks import carries_loss, next_token
from tintc.runtime.simulator import Simulator

Predict = Callable[[Batch, Tensor], Tensor]


class Learner(ABC):
    """Weights trained on each sequence's segment, and what they predict."""

    @abstractmethod
    def logits(self, batch: Batch, keep_K: Tensor) -> Tensor:
        """(B, K, V): of every sequence at the kept positions, under weights that were trained on
        that sequence alone.
        """

    @abstractmethod
    def losses(self, batch: Batch, labels_BT: Tensor) -> Tensor:
        """(B, T): at position t -log p(token t + 1) under the same weights; 0 where its label is
        -100.
        """

    @abstractmethod
    @contextmanager
    def trained(self, batch: Batch) -> Iterator[Predict]:
        """Trains on one sequence; yields what gives logits (1, K, V) of any other sequence under
        those weights.
        """


class Unmodified(Learner):
    """The model as it is: nothing is trained."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    @torch.inference_mode()
    def logits(self, batch: Batch, keep_K: Tensor) -> Tensor:
        return predict_initial(self.simulator, batch, keep_K)

    @torch.inference_mode()
    def losses(self, batch: Batch, labels_BT: Tensor) -> Tensor:
        return losses_of(lambda keep: self.logits(batch, keep), labels_BT)

    @contextmanager
    def trained(self, batch: Batch) -> Iterator[Predict]:
        yield self.logits


class Simulated(Learner):
    """A simulator. A negative rate ascends."""

    def __init__(self, simulator: Simulator, inner_lr: float) -> None:
        self.simulator, self.inner_lr = simulator, inner_lr

    @torch.inference_mode()
    def logits(self, batch: Batch, keep_K: Tensor) -> Tensor:
        return self.at_rate()(**batch.trained(), logits_to_keep=keep_K).logits

    @torch.inference_mode()
    def losses(self, batch: Batch, labels_BT: Tensor) -> Tensor:
        return self.at_rate().losses(**batch.trained(), labels=labels_BT).losses.cpu()

    @contextmanager
    def trained(self, batch: Batch) -> Iterator[Predict]:
        with torch.inference_mode():
            updates = self.at_rate().updates(**batch.trained())

        @torch.inference_mode()
        def predict(batch: Batch, keep_K: Tensor) -> Tensor:
            return self.simulator.predict(updates, **batch.prompt(), logits_to_keep=keep_K)

        yield predict

    def at_rate(self) -> Simulator:
        """The simulator; it is shared between rates, so this one is set anew."""
        self.simulator.inner_lr.data.fill_(self.inner_lr)
        return self.simulator


class DynamicEvaluation(Learner):
    """torch.autograd and the inner rule of a config (`compiler/autograd_rule.py`) on the sum of the
    cross-entropies of the targets, one sequence after the other; without one

        W_0 = W;  W_{k+1} = W_k - inner_lr * dL/dW (W_k),  k < steps

    for every weight that the simulator's program lists as updated. Weights are changed in place and
    put back.
    simulator: of exact gradients; only its forward pass before any update is used. rms: root mean
    squares of gradients, for the rule of that name.
    """

    def __init__(
        self, simulator: Simulator, config: SimulatorConfig, rms: dict[str, Tensor] | None = None
    ) -> None:
        self.simulator = simulator
        self.rule = InnerRule(config, matrices(simulator), simulator.program.aliases, rms)

    def logits(self, batch: Batch, keep_K: Tensor) -> Tensor:
        found = []
        for row in range(len(batch)):
            one = batch.row(row)
            with self.trained(one) as predict:
                found.append(predict(one, keep_K))
        return torch.cat(found)

    def losses(self, batch: Batch, labels_BT: Tensor) -> Tensor:
        found = []
        for row in range(len(batch)):
            one = batch.row(row)
            with self.trained(one) as predict:
                logits = functools.partial(predict, one)
                found.append(losses_of(logits, labels_BT[row : row + 1]))
        return torch.cat(found)

    @contextmanager
    def trained(self, batch: Batch) -> Iterator[Predict]:
        tensors = self.simulator.prefix.tensors()
        weights = {name: tensors[name] for name in updated_parameters(self.simulator)}
        flags = [(parameter, parameter.requires_grad) for parameter in self.simulator.parameters()]
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            self._train(batch, weights, before)

            @torch.inference_mode()
            def predict(batch: Batch, keep_K: Tensor) -> Tensor:
                return predict_initial(self.simulator, batch, keep_K)

            yield predict
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(before[name])
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _train(self, batch: Batch, weights: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        carries_T = carries_loss(batch.targets())[0]
        if not bool(carries_T.any()):
            return
        keep_K = carries_T.nonzero()[:, 0]
        targets_K = batch.input_ids[0, keep_K + 1].to(self.simulator.device)
        segment = batch.first_tokens(int(keep_K[-1]) + 1)
        self.simulator.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_()
        state = self.rule.start(before)
        with torch.enable_grad():
            for _ in range(self.rule.config.steps):
                loss = summed_loss(predict_initial(self.simulator, segment, keep_K)[0], targets_K)
                self.rule.step_in_place(loss, weights, state)


def predict_initial(simulator: Simulator, batch: Batch, keep_K: Tensor) -> Tensor:
    """(B, K, V): logits of the weights as they are."""
    return simulator.predict_initial(**batch.prompt(), logits_to_keep=keep_K)


def losses_of(logits: Callable[[Tensor], Tensor], labels_BT: Tensor) -> Tensor:
    """(B, T): cross-entropies from the logits of those positions alone that some sequence has a
    label for.
    """
    shifted_BT = next_token(labels_BT, -100)
    keep_K = (shifted_BT != -100).any(0).nonzero()[:, 0]
    logits_BKV = logits(keep_K)
    losses_BK = token_losses(logits_BKV, shifted_BT[:, keep_K].to(logits_BKV.device))
    losses = torch.zeros(labels_BT.shape, dtype=losses_BK.dtype)
    losses[:, keep_K] = losses_BK.cpu()
    return losses
