"""One call of a compiled simulator, as its programs know it.

Legend: B sequences, T tokens, K kept positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tintc.ir.choices import Choices, Contexts
from tintc.ir.inputs import of_training
from tintc.ir.outputs import Output
from tintc.runtime.masks import next_token


@dataclass(frozen=True)
class Call:
    """What one call asks a program for."""

    outputs: tuple[Output, ...]
    tensors: dict[str, Tensor]  # by the names of INPUTS and FURTHER_INPUTS, all but positions
    segment: int  # tokens that training passes see
    causal: bool = False  # the attention mask among the tensors is the causal one
    kept: Tensor | None = None  # (K,) positions whose logits are wanted; None for all
    scored: Tensor | None = None  # (L,) positions that carry loss in any sequence, if they are few
    some_losses: bool = False  # losses too are wanted at these positions alone
    given: dict[str, Tensor] | None = None  # slot -> its value: then nothing is trained, unless
    states: dict[str, Tensor] | None = None  # the inner rule's own slots are given too
    frozen: dict[str, Tensor] | None = None  # what no step changes, by name
    donated: bool = False  # nobody else holds these: they may be written over
    window: bool = (
        False  # of a stream: loss stands at the kept positions, all tokens are trained on
    )
    cache: dict[str, Tensor] | None = None  # keys and values of earlier tokens, by name
    contexts: Contexts = Contexts.EACH  # of the given values, which rows read which
    factored: frozenset[str] = frozenset()  # slots that are returned, or given, as factors
    lr_factor: float = 1.0  # of the schedule, where it is not in the graph

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        batch, tokens = self.tensors["input_ids"].shape
        return batch, tokens

    @property
    def positions(self) -> dict[str, Tensor]:
        """By the names of FURTHER_INPUTS."""
        known = {"kept": self.kept, "scored": self.scored}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def known(self) -> dict[str, Tensor]:
        """All that was computed before, by the names that programs have for it."""
        parts = (self.given, self.states, self.cache, self.frozen)
        return {name: value for part in parts for name, value in (part or {}).items()}

    @property
    def trains(self) -> bool:
        """Whether it needs steps."""
        return self.given is None and any(not kind.is_before for kind in self.outputs)

    @property
    def of_training(self) -> Call:
        """The same as a call of the training segments alone."""
        return replace(self, tensors=of_training(self.tensors))

    def labelled(self, labels_BT: Tensor) -> Call:
        """The same with the labels of its losses: of token t + 1 at position t."""
        return replace(self, tensors={**self.tensors, "labels": next_token(labels_BT, -100)})

    def kind(self, *, differentiable: bool) -> Choices:
        """Which program it needs, as far as the call itself says."""
        return Choices(
            self.outputs,
            from_updates=self.given is not None and self.states is None,
            contexts=self.contexts,
            factored=self.factored,
            from_states=self.states is not None,
            donated=self.donated,
            some_tokens=self.kept is not None and not self.window,
            some_losses=self.kept is not None and self.some_losses,
            scored=self.scored is not None
            and (self.trains or self.states is not None)
            and not self.factored,
            frozen=self.frozen is not None,
            window=self.window,
            cached=self.cache is not None,
            into=any(kind.into in self.tensors for kind in self.outputs),
            differentiable=differentiable,
            causal=self.causal,
        )


@contextmanager
def without_autocast(device_type: str) -> Iterator[None]:
    """A program is emitted for the type of its weights: its finite differences would lose their
    digits in a narrower one, and its kernels take no mixture.
    """
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield
