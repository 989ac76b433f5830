"""Who reads a text chunk by chunk: the unmodified model, true dynamic evaluation, a simulator, and
a simulator that is trained on shuffled tokens.

All of them read the same windows through the same `Stream`; they differ in what they learn from
one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tintc.compiler.autograd_rule import InnerRule
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.outputs import Output
from tintc.runtime.carried import Slots
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.streaming import Stream
from tintc.runtime.windows import IGNORED, Fresh, Window, window

Found = dict[str, Tensor | Slots]


class ShuffledStream(Stream):
    """Scores as usual, and trains on the same window in random order: the tokens of the chunk among
    themselves, behind those of the context among themselves. So the chunk's tokens are its targets
    as before, each once, and only their order is lost. With keys=cache the context is in the cache
    and keeps its order.
    """

    def _of_window(self, active: list[int], seen: Window, trains: bool) -> Found:
        scored = super()._of_window(active, seen, False)
        return super()._of_window(active, shuffled(seen), trains) | scored


def shuffled(seen: Window) -> Window:
    """The order follows from the tokens alone, so that no other text changes it."""
    contexts, fresh = [], []
    for ids_T, labels_T, valid_T in zip(seen.input_ids, seen.labels, seen.valid, strict=True):
        labels = labels_T[labels_T != IGNORED]
        first = ids_T[valid_T][: 1 - len(labels)] if len(labels) > 1 else ids_T[valid_T]
        digest = hashlib.sha256(torch.cat([first, labels]).numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        contexts.append(first[torch.randperm(len(first), generator=generator)])
        order = torch.randperm(len(labels), generator=generator)
        fresh.append(Fresh(labels[order], begins=False))
    return window(contexts, fresh)


class AutogradStream(Stream):
    """torch.autograd and an inner rule (`compiler/autograd_rule.py`) on the losses of each window,
    one row. The captured forward pass is the model's own, which compilation checked.

    Weights are changed in place; `autograd_stream` puts them back. simulator: of exact gradients,
    of which only the forward pass before any update is used.
    """

    def __init__(self, simulator: Simulator, settings: StreamSettings, rule: InnerRule) -> None:
        super().__init__(simulator, 1, settings, learns=False)
        tensors = simulator.prefix.tensors()
        self.rule = rule
        self.weights = {name: tensors[name] for name in updated_parameters(simulator)}
        self.before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.state = rule.start(self.before)

    @torch.no_grad()
    def forget(self) -> None:
        """Back to the weights of the model, and to a rule that has seen nothing."""
        for name, weight in self.weights.items():
            weight.copy_(self.before[name])
        self.state = self.rule.start(self.before)

    def _begin(self, new_B: Tensor) -> None:
        super()._begin(new_B)
        if bool(new_B.any()) and self.settings.reset == "document":
            self.forget()

    def _of_window(self, active: list[int], seen: Window, trains: bool) -> Found:
        """Losses and keys are those of the first forward pass."""
        first: Found | None = None
        self.rule.begin_chunk(self.state)
        for _ in range(self.rule.config.steps):
            with torch.enable_grad():
                found = super()._of_window(active, seen, trains)
                losses = found[Output.INITIAL_LOSSES]
                assert isinstance(losses, Tensor)
                self.rule.step_in_place(losses.sum(), self.weights, self.state)
            first = first or {name: _detached(value) for name, value in found.items()}
        assert first is not None
        return first


def _detached(value: Tensor | Slots) -> Tensor | Slots:
    if isinstance(value, Tensor):
        return value.detach()
    return {name: each.detach() for name, each in value.items()}


@contextmanager
def autograd_stream(
    simulator: Simulator, settings: StreamSettings, rule: InnerRule
) -> Iterator[AutogradStream]:
    """Puts the weights, and which of them ask for gradients, back."""
    flags = [(parameter, parameter.requires_grad) for parameter in simulator.parameters()]
    stream = AutogradStream(simulator, settings, rule)
    try:
        simulator.requires_grad_(False)
        for weight in stream.weights.values():
            weight.requires_grad_()
        yield stream
    finally:
        stream.forget()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
