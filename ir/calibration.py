"""How fast a machine multiplies and copies: what optimizations choose by.

A product of `rows` x `inner` with `inner` x `columns` takes 2 rows inner columns operations, at a
rate that depends on the three and on who computes it. Measured points (`runtime/calibrating.py`)
are interpolated over the rows at the nearest width. A fixed calibration has no points; what it says
are choices that no machine changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

KERNELS = ("blas", "onednn")  # of torch.matmul; of ir/ops/onednn.py
# A kernel that is less than so much faster than oneDNN is not worth a program of its own: two
# measurements differ as much.
_CLEARLY = 1.1
_NEARLY = 0.9  # of the full rate: rows beyond are not worth their memory

# What is fixed, by the type of the device; one without figures counts as an accelerator.
# Operations that take as long as moving one byte to or from memory: about 400 GFLOP/s by 15 GB/s on
# two CPU cores, 400 TFLOP/s by 3 TB/s on an H100.
OPERATIONS_PER_BYTE = {"cpu": 27.0, "cuda": 130.0}
# Tokens that a product needs to run at full speed: on two cores 256 are nearly as fast as 2048.
FULL_ROWS = {"cpu": 256, "cuda": 32768}


@dataclass(frozen=True)
class Point:
    """FLOP a second of one product by one kernel."""

    kernel: str
    rows: int
    inner: int
    columns: int
    rate: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """device: type of the device. bandwidth: bytes a second that a copy moves, read and written; 0
    if it is fixed. about: what it was measured on, and how it came about, for people.
    """

    device: str = "cpu"
    points: tuple[Point, ...] = ()
    bandwidth: float = 0.0
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        return bool(self.points)

    @lru_cache(maxsize=1 << 16)  # noqa: B019 (every call asks, and calibrations are few and stay)
    def rate(self, rows: int, inner: int, columns: int, kernel: str | None = None) -> float:
        """FLOP a second of a product, by the kernel or by the one that is chosen; 0 where nothing
        was measured.
        """
        if kernel is None:
            kernel = self.kernel(rows, inner, columns)
        curves = self._curves.get(kernel) or next(iter(self._curves.values()), None)
        if curves is None:
            return 0.0
        width = min(curves, key=lambda known: _distance(known, (inner, columns)))
        return _interpolated(curves[width], rows)

    def kernel(self, rows: int, inner: int, columns: int) -> str:
        """Who computes a product that either could: oneDNN, unless it is clearly slower here."""
        if not self._has_both:
            return next(iter(self._curves), "onednn")
        own, other = (self.rate(rows, inner, columns, name) for name in ("onednn", "blas"))
        return "blas" if other > _CLEARLY * own else "onednn"

    def slowness(self, rows: int, inner: int, columns: int) -> float:
        """How many times as long an operation of this product takes as one of the fastest."""
        return self._top / self.rate(rows, inner, columns) if self.measured else 1.0

    @cached_property
    def operations_per_byte(self) -> float:
        """Operations of the fastest product that take as long as moving a byte."""
        if self.measured:
            return self._top / self.bandwidth
        return OPERATIONS_PER_BYTE.get(self.device, OPERATIONS_PER_BYTE["cuda"])

    def full_rows(self, inner: int, columns: int) -> int:
        """The fewest rows at which a product of this width is nearly as fast as at any number."""
        if not self.measured:
            return FULL_ROWS.get(self.device, FULL_ROWS["cuda"])
        tried = sorted({point.rows for point in self.points})
        rates = {rows: self.rate(rows, inner, columns) for rows in tried}
        best = max(rates.values())
        return next(rows for rows in tried if rates[rows] >= _NEARLY * best)

    @cached_property
    def one_kernel(self) -> str | None:
        """The kernel of every product that was measured, if it is one: then programs need not
        know their sizes.
        """
        shapes = {(point.rows, point.inner, point.columns) for point in self.points}
        chosen = {self.kernel(*shape) for shape in shapes} or {self.kernel(1, 1, 1)}
        return chosen.pop() if len(chosen) == 1 else None

    @cached_property
    def _curves(self) -> dict[str, dict[tuple[int, int], list[tuple[int, float]]]]:
        """Kernel -> (inner, columns) -> (rows, rate), in order. More rows are never slower: where
        they were, something else ran on the machine.
        """
        found: dict[str, dict[tuple[int, int], list[tuple[int, float]]]] = {}
        for point in sorted(self.points, key=lambda each: each.rows):
            curve = found.setdefault(point.kernel, {}).setdefault((point.inner, point.columns), [])
            curve.append((point.rows, max(point.rate, curve[-1][1] if curve else 0.0)))
        return found

    @cached_property
    def _has_both(self) -> bool:
        return set(KERNELS) <= set(self._curves)

    @cached_property
    def _top(self) -> float:
        return max(point.rate for point in self.points)


def fixed(device: str) -> Calibration:
    """The calibration of every device of a type where none is measured."""
    return _FIXED.setdefault(device, Calibration(device, about={"from": "fixed"}))


_FIXED: dict[str, Calibration] = {}
FIXED = fixed("cpu")


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    return sum(abs(math.log2(x / max(y, 1))) for x, y in zip(a, b, strict=True))


def _interpolated(curve: list[tuple[int, float]], rows: int) -> float:
    """Between the two nearest numbers of rows, along their logarithm."""
    (before, low) = curve[0]
    for here, rate in curve:
        if rows <= here:
            if here == before:
                return rate
            part = (math.log2(max(rows, before)) - math.log2(before)) / math.log2(here / before)
            return low + part * (rate - low)
        before, low = here, rate
    return low
