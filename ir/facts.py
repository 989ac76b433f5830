"""What the passes learn about the auxiliary model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """None in the two limits: no limit. Passes write through `Context.learn`."""

    vocab_size: int = 0
    hidden: int = 0
    max_positions: int | None = None  # rows of the shortest table of positions
    # The longest sequence for which graph and masks were seen to hold, whatever the positions are.
    max_tokens: int | None = None
    blocks: int = 0  # residual blocks
    trained_blocks: int = 0
    block_path: str = ""  # where the numbered blocks are, as in `model.layers`
    # Module of an island whose results depend on where a token stands, or on other tokens.
    ordered: str = ""

    def block_of(self, path: str) -> int | None:
        """Number of the block that a module or parameter is part of; None outside of blocks."""
        inside = self.block_path and path.startswith(f"{self.block_path}.")
        number = path.removeprefix(f"{self.block_path}.").partition(".")[0] if inside else ""
        return int(number) if number.isdecimal() else None

    @property
    def longest(self) -> int | None:
        """The longest sequence with positions 0, 1, 2, ...; None for no limit."""
        return least(self.max_positions, self.max_tokens)


def least(*limits: int | None) -> int | None:
    """The smallest limit; None where there is none."""
    return min((n for n in limits if n is not None), default=None)
