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
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.ops.head import token_losses
from tintc.ir.precision import wide
from tintc.runtime.outputs import SimulatorOutput
from tintc.runtime.simulator import Simulator


@dataclass(frozen=True)
class Sequences:
    """What a learner reads; each tensor as in `Simulator.forward`."""

    input_ids: Tensor
    train_mask: Tensor
    loss_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, start: int, stop: int) -> Sequences:
        """Some of the sequences."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Sequences(*(None if part is None else part[start:stop] for part in parts))  # type: ignore[arg-type]

    def head(self, tokens: int) -> Sequences:
        """The first tokens of every sequence."""
        attention = None if self.attention_mask is None else self.attention_mask[..., :tokens]
        attention = (
            attention[:, :tokens] if attention is not None and attention.ndim == 3 else attention
        )
        loss, positions = (
            None if part is None else part[:, :tokens]
            for part in (self.loss_mask, self.position_ids)
        )
        return Sequences(
            self.input_ids[:, :tokens], self.train_mask[:, :tokens], loss, attention, positions
        )

    def targets(self) -> Tensor:
        """(B, T) bool: tokens that are trained on as targets. Padding is no target as long as the
        masks say so.
        """
        targets = (
            self.train_mask.bool()
            if self.loss_mask is None
            else self.train_mask.bool() & self.loss_mask.bool()
        )
        return targets & (torch.arange(targets.shape[1]) > 0)


Predict = Callable[[Sequences, Tensor], Tensor]


class Learner(ABC):
    """Weights trained on each sequence's segment, and what they predict."""

    @abstractmethod
    def logits(self, sequences: Sequences, keep_K: Tensor) -> Tensor:
        """(B, K, V): of every sequence at the kept positions, under weights that were trained on
        that sequence alone.
        """

    @abstractmethod
    def losses(self, sequences: Sequences, labels_BT: Tensor) -> Tensor:
        """(B, T): at position t -log p(token t + 1) under the same weights; 0 where its label is
        -100.
        """

    @abstractmethod
    @contextmanager
    def trained(self, sequence: Sequences) -> Iterator[Predict]:
        """Trains on one sequence; yields what gives logits (1, K, V) of any other sequence under
        those weights.
        """


class Unmodified(Learner):
    """The model as it is: nothing is trained."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    @torch.inference_mode()
    def logits(self, sequences: Sequences, keep_K: Tensor) -> Tensor:
        return predict_initial(self.simulator, sequences, keep_K)

    @torch.inference_mode()
    def losses(self, sequences: Sequences, labels_BT: Tensor) -> Tensor:
        return losses_of(lambda keep: self.logits(sequences, keep), labels_BT)

    @contextmanager
    def trained(self, sequence: Sequences) -> Iterator[Predict]:
        yield self.logits


class Simulated(Learner):
    """A simulator. A negative rate ascends."""

    def __init__(self, simulator: Simulator, inner_lr: float) -> None:
        self.simulator, self.inner_lr = simulator, inner_lr

    @torch.inference_mode()
    def logits(self, sequences: Sequences, keep_K: Tensor) -> Tensor:
        x = sequences
        out: SimulatorOutput = self._set()(
            x.input_ids,
            x.train_mask,
            x.loss_mask,
            x.attention_mask,
            x.position_ids,
            logits_to_keep=keep_K,
        )
        return out.logits

    @torch.inference_mode()
    def losses(self, sequences: Sequences, labels_BT: Tensor) -> Tensor:
        x = sequences
        return (
            self._set()
            .losses(
                x.input_ids, x.train_mask, labels_BT, x.loss_mask, x.attention_mask, x.position_ids
            )
            .losses.cpu()
        )

    @contextmanager
    def trained(self, sequence: Sequences) -> Iterator[Predict]:
        x = sequence
        with torch.inference_mode():
            updates = self._set().updates(
                x.input_ids, x.train_mask, x.loss_mask, x.attention_mask, x.position_ids
            )

        @torch.inference_mode()
        def predict(x: Sequences, keep_K: Tensor) -> Tensor:
            return self.simulator.predict(
                updates, x.input_ids, x.attention_mask, x.position_ids, logits_to_keep=keep_K
            )

        yield predict

    def _set(self) -> Simulator:
        self.simulator.inner_lr.data.fill_(self.inner_lr)  # simulators are shared between rates
        return self.simulator


class DynamicEvaluation(Learner):
    """torch.autograd and SGD on the sum of the cross-entropies of the targets, one sequence after
    the other:

        W_0 = W;  W_{k+1} = W_k - inner_lr * dL/dW (W_k),  k < steps

    for every weight that the simulator's program lists as updated. Weights are changed in place and
    put back.
    simulator: of exact gradients; only its forward pass before any update is used.
    """

    def __init__(self, simulator: Simulator, inner_lr: float, steps: int) -> None:
        self.simulator, self.inner_lr, self.steps = simulator, inner_lr, steps

    def logits(self, sequences: Sequences, keep_K: Tensor) -> Tensor:
        found = []
        for row in range(len(sequences)):
            one = sequences.rows(row, row + 1)
            with self.trained(one) as predict:
                found.append(predict(one, keep_K))
        return torch.cat(found)

    def losses(self, sequences: Sequences, labels_BT: Tensor) -> Tensor:
        found = []
        for row in range(len(sequences)):
            one = sequences.rows(row, row + 1)
            with self.trained(one) as predict:
                logits = functools.partial(predict, one)
                found.append(losses_of(logits, labels_BT[row : row + 1]))
        return torch.cat(found)

    @contextmanager
    def trained(self, sequence: Sequences) -> Iterator[Predict]:
        tensors = self.simulator.prefix.tensors()
        weights = [tensors[name] for name in updated_parameters(self.simulator)]
        flags = [(parameter, parameter.requires_grad) for parameter in self.simulator.parameters()]
        before = [weight.detach().clone() for weight in weights]
        try:
            self._train(sequence, weights)

            @torch.inference_mode()
            def predict(x: Sequences, keep_K: Tensor) -> Tensor:
                return predict_initial(self.simulator, x, keep_K)

            yield predict
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _train(self, sequence: Sequences, weights: list[Tensor]) -> None:
        targets_1T = sequence.targets()
        if not bool(targets_1T.any()):
            return
        last = int(targets_1T[0].nonzero()[-1])
        segment, targets_1S = (
            sequence.head(last),
            targets_1T[:, 1 : last + 1],
        )  # position t predicts token t + 1
        labels_S = sequence.input_ids[0, 1 : last + 1][targets_1S[0]].to(self.simulator.device)
        keep_K = targets_1S[0].nonzero()[:, 0]
        self.simulator.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_()
        optimizer = torch.optim.SGD(weights, lr=abs(self.inner_lr), maximize=self.inner_lr < 0)
        for _ in range(self.steps):
            with torch.enable_grad():
                loss = F.cross_entropy(
                    wide(predict_initial(self.simulator, segment, keep_K)[0]),
                    labels_S,
                    reduction="sum",
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def predict_initial(simulator: Simulator, x: Sequences, keep_K: Tensor) -> Tensor:
    """(B, K, V): logits of the weights as they are."""
    return simulator.predict_initial(
        x.input_ids, x.attention_mask, x.position_ids, logits_to_keep=keep_K
    )


def losses_of(logits: Callable[[Tensor], Tensor], labels_BT: Tensor) -> Tensor:
    """(B, T): cross-entropies from the logits of those positions alone that some sequence has a
    label for.
    """
    shifted_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
    keep_K = (shifted_BT != -100).any(0).nonzero()[:, 0]
    logits_BKV = logits(keep_K)
    losses_BK = token_losses(logits_BKV, shifted_BT[:, keep_K].to(logits_BKV.device))
    losses = torch.zeros(labels_BT.shape, dtype=losses_BK.dtype)
    losses[:, keep_K] = losses_BK.cpu()
    return losses
