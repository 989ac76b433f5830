"""What the passes learn about the auxiliary model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ModelFacts:
    """What passes learn about the auxiliary model.

    max_positions: rows of the shortest table of positions. max_tokens: the longest sequence for
    which the graph and its masks were seen to hold, whatever the positions are. Both None: no
    limit. blocks: residual blocks; trained_blocks: how many learn. block_path: where the numbered
    blocks are, as in `model.layers`.
    """

    vocab_size: int = 0
    hidden: int = 0
    max_positions: int | None = None
    max_tokens: int | None = None
    blocks: int = 0
    trained_blocks: int = 0
    block_path: str = ""

    @property
    def longest(self) -> int | None:
        """The longest sequence with positions 0, 1, 2, ...; None for no limit."""
        return min(
            (n for n in (self.max_positions, self.max_tokens) if n is not None), default=None
        )

    def limit_positions(self, rows: int) -> None:
        """Notes a table of that many positions."""
        self.max_positions = rows if self.max_positions is None else min(rows, self.max_positions)

    def limit_tokens(self, length: int) -> None:
        """Notes that nothing is known of longer sequences."""
        self.max_tokens = length if self.max_tokens is None else min(length, self.max_tokens)
