"""What a call of a simulator can be asked for, and how these things belong together.

The values are the names that graphs, emitted programs, ONNX models and JSON use.
"""

from __future__ import annotations

from enum import StrEnum


class Output(StrEnum):
    """One kind of result."""

    LOGITS = "logits"  # (B, T, V) under each sequence's updated weights
    INITIAL_LOGITS = "initial_logits"  # the same before any update
    LOSSES = "losses"  # (B, T): -log p(token t + 1) at position t, under the updated weights
    INITIAL_LOSSES = "initial_losses"  # the same before any update
    UPDATES = "updates"  # slot -> its value after the last step, one a sequence
    STATES = "states"  # the same of the inner rule's own slots: momentum, moments
    CACHE = "cache"  # keys and values of the first forward pass, by name, for later windows
    FROZEN = "frozen"  # what no step changes, by name, for the programs of later steps

    @property
    def before(self) -> Output:
        """The same before any update. Raises KeyError for updates, which have no such thing."""
        return _BEFORE[self]

    @property
    def is_before(self) -> bool:
        """Whether it is of the weights as they were before any update."""
        return self in (Output.INITIAL_LOGITS, Output.INITIAL_LOSSES)

    @property
    def of_losses(self) -> bool:
        """Whether it is losses, for which a call needs labels."""
        return self in _LOGITS

    @property
    def logits(self) -> Output:
        """The logits that losses are computed from; anything else is itself."""
        return _LOGITS.get(self, self)

    @property
    def losses(self) -> Output:
        """The losses of these logits. Raises KeyError for what is no logits."""
        return _LOSSES[self]

    @property
    def into(self) -> str:
        """Name of the input that takes the tensor which these logits are written into."""
        return f"{self.value}_into"


_LOSSES = {Output.LOGITS: Output.LOSSES, Output.INITIAL_LOGITS: Output.INITIAL_LOSSES}
_LOGITS = {losses: logits for logits, losses in _LOSSES.items()}
_BEFORE = {
    Output.LOGITS: Output.INITIAL_LOGITS,
    Output.LOSSES: Output.INITIAL_LOSSES,
    Output.INITIAL_LOGITS: Output.INITIAL_LOGITS,
    Output.INITIAL_LOSSES: Output.INITIAL_LOSSES,
}

SLOTS = (Output.UPDATES, Output.STATES)  # tensors by slot

# What a lowered graph returns; everything else is computed from it.
LOWERED = (Output.LOGITS, Output.INITIAL_LOGITS, Output.UPDATES)


def without_losses(outputs: tuple[Output, ...]) -> tuple[Output, ...]:
    """The same, with the logits that losses are computed from in their place, each once."""
    return tuple(dict.fromkeys(kind.logits for kind in outputs))
