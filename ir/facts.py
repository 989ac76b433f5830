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
    min_tokens: int = 0  # the shortest sequence for which the graph stands; 0 for any
    blocks: int = 0  # residual blocks
    trained_blocks: int = 0
    block_path: str = ""  # where the numbered blocks are, as in `model.layers`; "" if nowhere
    # Of blocks in no such place: of each, in order, the paths of its modules and weights.
    block_parts: tuple[tuple[str, ...], ...] = ()
    # Module of an island whose results depend on where a token stands, or on other tokens.
    ordered: str = ""
    # Module of an attention whose rotation depends on how many positions the call has.
    by_length: str = ""

    def block_of(self, path: str) -> int | None:
        """Number of the block that a module or parameter is part of; None outside of blocks."""
        number, _ = self.place(path)
        return int(number) if number else None

    @property
    def longest(self) -> int | None:
        """The longest sequence with positions 0, 1, 2, ...; None for no limit."""
        return least(self.max_positions, self.max_tokens)

    def place(self, path: str) -> tuple[str, str]:
        """(number of the block that a module or weight is of, where in a block it stands: the same
        for blocks that are alike); ("", path) for one outside of blocks.
        """
        if self.block_path and path.startswith(f"{self.block_path}."):
            number, dot, rest = path[len(self.block_path) + 1 :].partition(".")
            return (number, f"{self.block_path}.*{dot}{rest}") if number.isdecimal() else ("", path)
        for block, parts in enumerate(self.block_parts):
            for each, part in enumerate(parts):
                if path == part or path.startswith(f"{part}."):
                    return str(block), f"{each}*{path[len(part) :]}"
        return "", path


def least(*limits: int | None) -> int | None:
    """The smallest limit; None where there is none."""
    return min((n for n in limits if n is not None), default=None)
