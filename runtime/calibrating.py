"""Measures how fast this machine multiplies and copies, in at most three seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tintc.ir.calibration import Calibration, Point
from tintc.ir.ops.onednn import available, onednn_product
from tintc.runtime.machine import copy_bandwidth, timed

SECONDS = 3.0
Shape = tuple[int, int, int]  # rows, inner size, columns

# From one token to a batch, and the widths of small layers, of attention and of feed-forward layers
# of models of a hundred million parameters.
ROWS = (1, 16, 64, 128, 256, 512, 1024)
WIDTHS = ((256, 256), (768, 768), (768, 3072), (3072, 768))
SHAPES: tuple[Shape, ...] = tuple(
    sorted(
        ((rows, *width) for rows in ROWS for width in WIDTHS),
        key=lambda shape: shape[0] * shape[1] * shape[2],
    )
)
_COPIED = 1 << 26
_WEIGHTS = 1 << 27  # bytes: several times what a cache holds
_COPIES = 3
_FOR_COPIES = 0.1  # of the time
_ROUNDS = 10


def kernels(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Who computes products of this type on this device."""
    single = torch.device(device).type == "cpu" and dtype == torch.float32
    return ("blas", "onednn") if single and available() else ("blas",)


@torch.inference_mode()
def measure(
    device: str,
    dtype: torch.dtype,
    shapes: Iterable[Shape] = SHAPES,
    seconds: float = SECONDS,
    about: dict[str, str] | None = None,
) -> Calibration:
    """Rates of the shapes by each kernel on offer, and the bandwidth of a copy. Activations are in
    the cache, weights are not: as in a program, which reads one weight after the other.

    All are measured in turn, again and again while there is time, and the best of each counts: what
    else the machine does slows another one each time. The first shape is always measured; of the
    others those are left out that would take too long, judging by the rate of the last.
    """
    with _disable_current_modes():  # what counts or fakes a call is no part of it
        bandwidth = copy_bandwidth(device, _COPIED, _COPIES)
        best = _best(device, dtype, shapes, seconds * (1 - _FOR_COPIES))
    points = tuple(
        Point(kernel, *shape, _flops(shape) / time) for (kernel, shape), time in best.items()
    )
    return Calibration(torch.device(device).type, points, bandwidth, about or {})


def _best(
    device: str, dtype: torch.dtype, shapes: Iterable[Shape], seconds: float
) -> dict[tuple[str, Shape], float]:
    """The shortest time of each product."""
    end = time.perf_counter() + seconds
    offered, weights = kernels(device, dtype), _Weights(device, dtype)
    best: dict[tuple[str, Shape], float] = {}
    rate = 0.0
    for shape in shapes:
        if best and time.perf_counter() + 2 * len(offered) * _flops(shape) / rate > end:
            continue
        for kernel in offered:
            product = _product(kernel, shape, weights)
            product()
            best[kernel, shape] = max(timed(product, device), 1e-9)
        rate = _flops(shape) / max(best[kernel, shape] for kernel in offered)
    for _ in range(_ROUNDS):
        for (kernel, shape), known in best.items():
            if time.perf_counter() + 2 * known > end:
                continue
            product = _product(kernel, shape, weights)
            product()  # activations are in the cache then
            best[kernel, shape] = max(min(known, timed(product, device)), 1e-9)
    return best


def _flops(shape: Shape) -> int:
    rows, inner, columns = shape
    return 2 * rows * inner * columns


class _Weights:
    """Weights that no cache holds: parts of so much memory that their turn comes late."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.all = torch.ones(_WEIGHTS // dtype.itemsize, dtype=dtype, device=device)
        self._next = 0

    def next(self, columns: int, inner: int) -> Tensor:
        """(columns, inner)."""
        size = columns * inner
        if size > len(self.all):  # such a one is no guest of a cache by itself
            self.all = self.all.new_ones(size)
        start = self._next if self._next + size <= len(self.all) else 0
        self._next = start + size
        return self.all[start : self._next].view(columns, inner)


def _product(kernel: str, shape: Shape, weights: _Weights) -> Callable[[], Tensor]:
    """Of another weight in each call."""
    rows, inner, columns = shape
    x = weights.all.new_ones(rows, inner)
    if kernel == "onednn":
        return lambda: onednn_product(x, weights.next(columns, inner), None, None, False)
    return lambda: x @ weights.next(columns, inner).mT
