"""Where things lie in the simulator's tokens: named ranges, never bare offsets.

The simulator's sequence is K prefix tokens followed by the input tokens, each of D_sim coordinates
(TINT.md section 3). A *page* is what one TinT module reads: up to K prefix tokens. A weight matrix that is
too large for one page is cut into tiles, one a page. Kept activations lie in coordinates beside the working
D_sim, which `assign_memory_slots` shares out by liveness.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """start <= i < stop of a named axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: Range) -> bool:
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True)
class Tile:
    """Rows x columns of one slot in one page. Prefix token j holds `rows_per_token` consecutive rows, side by side
    from `coordinates.start`; the last tokens may hold padding rows. replicated: every token holds all rows (a bias)."""

    page: int
    rows: Range
    columns: Range
    rows_per_token: int
    tokens: Range
    coordinates: Range
    replicated: bool = False


@dataclass(frozen=True)
class PrefixSlot:
    """One auxiliary weight, or some rows of it, in prefix tokens.

    parameter, rows, transpose: where its value comes from in the auxiliary state dict (rows counted after
    transposing). shape: (O, I) or (D,). trainable: whether descent updates it.
    """

    name: str
    parameter: str
    rows: Range
    transpose: bool
    shape: tuple[int, ...]
    trainable: bool
    tiles: tuple[Tile, ...]

    @property
    def numbers(self) -> int:
        """Numbers of the weight itself, without padding."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class MemorySlot:
    """Coordinates of one kept activation: taken from the node that makes it, `name`, until the node `last` has read it."""

    name: str
    coordinates: Range
    last: str


@dataclass(frozen=True)
class Layout:
    """K, D_sim, H_sim, all slots, and the number of pages."""

    prefix_tokens: int
    sim_hidden: int
    sim_heads: int
    pages: int
    prefix: dict[str, PrefixSlot] = field(default_factory=dict)
    memory: dict[str, MemorySlot] = field(default_factory=dict)

    @property
    def prefix_numbers(self) -> int:
        """Numbers in all prefix embeddings, padding included: K * D_sim a page."""
        return self.pages * self.prefix_tokens * self.sim_hidden

    @property
    def memory_width(self) -> int:
        """Coordinates per input token that hold kept activations."""
        return max((slot.coordinates.stop for slot in self.memory.values()), default=0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """Inverse of `to_dict`, also from JSON."""
        return cls(
            **{name: values[name] for name in ("prefix_tokens", "sim_hidden", "sim_heads", "pages")},
            prefix={name: _prefix_slot(slot) for name, slot in values["prefix"].items()},
            memory={name: MemorySlot(slot["name"], Range(**slot["coordinates"]), slot["last"]) for name, slot in values["memory"].items()},
        )


def _prefix_slot(values: dict[str, Any]) -> PrefixSlot:
    tiles = tuple(
        Tile(
            **{
                **tile,
                **{axis: Range(**tile[axis]) for axis in ("rows", "columns", "tokens", "coordinates")},
            }
        )
        for tile in values["tiles"]
    )
    return PrefixSlot(**{**values, "rows": Range(**values["rows"]), "shape": tuple(values["shape"]), "tiles": tiles})
