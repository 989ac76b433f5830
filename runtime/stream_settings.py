"""How a stream reads its texts. Nothing here imports torch: commands take their options from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tintc.ir.described import about
from tintc.ir.errors import UsageError

Keys = Literal["recompute", "cache"]
Reset = Literal["document", "never"]


@dataclass(frozen=True)
class StreamSettings:
    """How a text is cut, and what carries over. Every field says beside itself what it is for.
    C and L: see TINT.md section 8.
    """

    chunk: int = field(
        default=128,
        metadata=about("Targets that are scored and then trained on: C.", metavar="C"),
    )
    context: int = field(
        default=384,
        metadata=about("Tokens in front of a chunk that it may look at: L.", metavar="L"),
    )
    keys: Keys = field(
        default="recompute",
        metadata=about(
            "Keys and values of the context: computed anew under the newest weights, or kept as "
            "they were when scored (cache)."
        ),
    )
    reset: Reset = field(
        default="document",
        metadata=about(
            "Whether weights and the rule's state start anew with each document, or never do."
        ),
    )

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
                f"{self.chunk + self.context} tokens; this model takes {longest}: expected smaller "
                "ones"
            )
