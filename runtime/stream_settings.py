"""How a text is cut into windows, and what carries over. TINT.md section 8. Nothing here imports
torch: commands read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tintc.ir.errors import UsageError

Keys = Literal["recompute", "cache"]
Reset = Literal["document", "never"]


@dataclass(frozen=True)
class StreamSettings:
    """How a text is cut, and what carries over. chunk: C, targets that are scored and then trained
    on. context: L, tokens in front that they may look at. keys: whether keys and values of the
    context are computed anew under the newest weights, or stay as they were when scored. reset:
    whether weights and the rule's state start anew with each document."""

    chunk: int = 128
    context: int = 384
    keys: Keys = "recompute"
    reset: Reset = "document"

    def check(self, longest: int | None) -> None:
        """Raises UsageError for sizes that no window of a model of that length has."""
        for name, least in (("chunk", 1), ("context", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is {value!r}; expected a whole number, at least {least}")
        for name, allowed in (("keys", ("recompute", "cache")), ("reset", ("document", "never"))):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}; expected {' or '.join(allowed)}"
                )
        if longest is not None and self.chunk + self.context > longest:
            raise UsageError(
                f"chunk {self.chunk} and context {self.context} make windows of "
                f"{self.chunk + self.context} tokens; this model takes {longest}"
            )
