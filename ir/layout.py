"""Where things lie in the simulator's tokens: named ranges, never bare offsets.

The simulator's sequence is K prefix tokens followed by the input tokens (TINT.md section 3). A
*page* is what one TinT module reads: K prefix tokens of D_sim coordinates. A weight matrix that is
too large for one page is cut into tiles, one a page. Every activation of an input token lies in
coordinates that `assign_memory_slots` shares out by liveness, so an input token is as wide as what
lives at once needs (`memory_width`), usually far wider than D_sim.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar


@dataclass(frozen=True)
class Range:
    """start <= i < stop of a named axis. Raises ValueError for what is no range."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"{self.start}:{self.stop} is no range")

    @property
    def size(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: Range) -> bool:
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


T = TypeVar("T")

# What the inner rule keeps beside a weight's own slot, in `slot/KIND`.
_BESIDE = ("momentum", "first", "second", "gradient", "original", "statistics")


def beside(slot: str) -> str:
    """The slot of the weight that this one stands beside; nothing for a weight's own."""
    weight, _, kind = slot.rpartition("/")
    return weight if kind in _BESIDE else ""


def first_overlap(boxes: Iterable[tuple[T, Range, Range]]) -> tuple[T, T] | None:
    """Two that share a point of their two ranges, or None.

    A sweep along the first range: of the boxes that it cuts, the second ranges are kept in order,
    so that each new one is compared with its neighbours alone.
    """
    ends: list[tuple[int, int]] = []  # of the first range; start of the second
    cut: list[tuple[int, int, T]] = []  # start and stop of the second range
    for found, along, across in sorted(boxes, key=lambda box: box[1].start):
        if not along.size or not across.size:
            continue
        while ends and ends[0][0] <= along.start:
            _, start = heapq.heappop(ends)
            del cut[bisect_left(cut, start, key=lambda each: each[0])]
        place = bisect_left(cut, across.start, key=lambda each: each[0])
        for start, stop, other in cut[max(place - 1, 0) : place + 1]:
            if start < across.stop and across.start < stop:
                return other, found
        cut.insert(place, (across.start, across.stop, found))
        heapq.heappush(ends, (along.stop, across.start))
    return None


@dataclass(frozen=True)
class Rows:
    """Rows start <= r mod period < stop of a parameter. Consecutive ones have all rows of the
    parameter as their period; those of q, k or v in a product that alternates between them head by
    head have the rows of a head. Raises ValueError for what is no range."""

    start: int
    stop: int
    period: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.period:
            raise ValueError(f"{self.start}:{self.stop} of {self.period} are no rows")

    def overlaps(self, other: Rows) -> bool:
        """Whether both may hold the same row; rows that repeat differently are taken to overlap."""
        return self.period != other.period or (self.start < other.stop and other.start < self.stop)

    def label(self, parameter: str, rows: int) -> str:
        """How a slot with these rows of a parameter is called."""
        if (self.start, self.stop) == (0, rows):
            return parameter
        return (
            f"{parameter}[{self.start}:{self.stop}]"
            if self.period == rows
            else f"{parameter}[{self.start}:{self.stop} of {self.period}]"
        )


@dataclass(frozen=True)
class Tile:
    """Rows x columns of one slot in one page, dealt out to its prefix tokens like cards.

    Of n = tokens.size tokens, token j holds rows j, j + n, j + 2n, ... side by side, each in
    `row_width` coordinates (its columns, then padding up to whole heads), from `coordinates.start`.
    The s-th rows of all tokens are n consecutive rows of the matrix, so what a head of linear
    attention finds over j needs no reordering.
    """

    page: int
    rows: Range
    columns: Range
    tokens: Range
    coordinates: Range
    row_width: int

    def __post_init__(self) -> None:
        if self.page < 0 or self.row_width < 1 or not self.tokens.size:
            raise ValueError(f"page {self.page}, rows of {self.row_width} numbers: no tile")

    @property
    def groups(self) -> int:
        """Rows in one token, S; the last may be padding."""
        return math.ceil(self.rows.size / self.tokens.size)


@dataclass(frozen=True)
class PrefixSlot:
    """One auxiliary weight, or some rows of it, in prefix tokens.

    parameter, rows, transpose: where its value comes from in the auxiliary state dict (rows counted
    after transposing). shape: (O, I) or (D,). trainable: whether it is chosen to learn.
    updated: whether a gradient reaches it, so that it does; of q and k under `value` none does.
    beside: of what the inner rule keeps beside a weight: that weight's slot, whose places it has on
    pages of its own. zero: its pages hold zeros at first, not the parameter.
    """

    name: str
    parameter: str
    rows: Rows
    transpose: bool
    shape: tuple[int, ...]
    trainable: bool
    tiles: tuple[Tile, ...]
    updated: bool = False
    beside: str = ""
    zero: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 2) or min(self.shape) < 1:
            raise ValueError(f"{self.name} has shape {self.shape}; expected a vector or a matrix")

    @property
    def numbers(self) -> int:
        """Numbers of the weight itself, without padding."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class MemorySlot:
    """Coordinates of one activation: taken from the node that makes it, `name`, until the node
    `last` has read it.
    kept: a backward or descent node reads this forward activation."""

    name: str
    coordinates: Range
    last: str
    kept: bool


@dataclass(frozen=True)
class Layout:
    """K, D_sim, H_sim, all slots, and the number of pages. Every tile that holds a matrix is whole
    heads wide. Raises ValueError for what is none.
    """

    prefix_tokens: int
    sim_hidden: int
    sim_heads: int
    pages: int
    prefix: dict[str, PrefixSlot] = field(default_factory=dict)
    memory: dict[str, MemorySlot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (self.prefix_tokens, self.sim_hidden, self.sim_heads, self.pages)
        if min(sizes) < 1:
            raise ValueError(f"{', '.join(map(str, sizes))} are no sizes of a layout")

    @property
    def head_width(self) -> int:
        """Coordinates of one of the H_sim heads, d = D_sim / H_sim; at least K, so that a one-hot
        of K fits.
        """
        return self.sim_hidden // self.sim_heads

    @property
    def prefix_numbers(self) -> int:
        """Numbers in all prefix embeddings, padding included: K * D_sim a page."""
        return self.pages * self.prefix_tokens * self.sim_hidden

    @cached_property
    def updated_numbers(self) -> int:
        """Of the weights that descend; what an inner rule keeps beside them is not `updated`."""
        return sum(slot.numbers for slot in self.prefix.values() if slot.updated)

    @property
    def memory_width(self) -> int:
        """Coordinates per input token that hold activations."""
        return max((slot.coordinates.stop for slot in self.memory.values()), default=0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """Inverse of `to_dict`, also from JSON."""
        return cls(
            **{
                name: values[name] for name in ("prefix_tokens", "sim_hidden", "sim_heads", "pages")
            },
            prefix={name: _prefix_slot(slot) for name, slot in values["prefix"].items()},
            memory={
                name: MemorySlot(**{**slot, "coordinates": Range(**slot["coordinates"])})
                for name, slot in values["memory"].items()
            },
        )


def _prefix_slot(values: dict[str, Any]) -> PrefixSlot:
    tiles = tuple(
        Tile(
            **{
                **tile,
                **{
                    axis: Range(**tile[axis])
                    for axis in ("rows", "columns", "tokens", "coordinates")
                },
            }
        )
        for tile in values["tiles"]
    )
    return PrefixSlot(
        **{
            **values,
            "rows": Rows(**values["rows"]),
            "shape": tuple(values["shape"]),
            "tiles": tiles,
        }
    )
