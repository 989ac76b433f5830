"""Calibrations that no machine has: fast and slow kernels and memories, to force every choice."""

from __future__ import annotations

from collections.abc import Callable

from tintc.ir.calibration import Calibration, Point

ROWS = (1, 4, 16, 64, 256)
WIDTHS = ((8, 8), (16, 16), (64, 64))
Rate = Callable[[str, int], float]  # of a kernel, at so many rows


def speed(
    rate: Rate, bandwidth: float = 1e9, kernels: tuple[str, ...] = ("blas", "onednn")
) -> Calibration:
    points = tuple(
        Point(kernel, rows, *width, rate(kernel, rows))
        for kernel in kernels
        for rows in ROWS
        for width in WIDTHS
    )
    return Calibration("cpu", points, bandwidth, {"from": "a test"})


def only(kernel: str, bandwidth: float = 1e9) -> Calibration:
    """One kernel is twice as fast, at any number of rows."""
    return speed(lambda name, rows: 2e9 if name == kernel else 1e9, bandwidth)


def by_rows() -> Calibration:
    """torch.matmul is faster at few rows, oneDNN at many."""
    return speed(lambda name, rows: 2e9 if name == "blas" else 1e9 if rows <= 16 else 4e9)


def full_at(rows: int) -> Calibration:
    """Products reach their rate at so many rows, and have a tenth of it below."""
    return speed(lambda name, tried: 1e9 if tried >= rows else 1e8)


SPEEDS = {
    "blas": only("blas"),
    "onednn": only("onednn"),
    "by_rows": by_rows(),
    "slow_memory": only("onednn", bandwidth=1e3),  # factors win everywhere
    "fast_memory": only("onednn", bandwidth=1e15),
    "small_slices": full_at(4),
    "large_slices": full_at(64),
}
