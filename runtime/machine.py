"""The machine that programs run on: its name, a clock that waits for it, and its freed memory."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from functools import cache

import torch

_BYTES = 1 << 28  # of a tensor that is copied: far more than a cache holds


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that a call takes, the work that it leaves to the device included."""
    _synchronize(device)
    start = time.perf_counter()
    result = function()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del result  # what it takes to let go of the results is no part of the call
    return seconds


def copy_bandwidth(device: str, size: int = _BYTES, copies: int = 5) -> float:
    """Bytes a second that a copy of a large tensor moves, read and written, at its best."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(copies))
    return 2 * source.nbytes / seconds


def device_name(device: str) -> str:
    """What the machine calls its processor or accelerator; of a processor also the vector
    instructions that torch uses, on which speed depends as much.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"


def hand_back_freed() -> bool:
    """Gives the system what was freed and glibc still holds. It lies in pieces between what lives,
    which fit a next piece of work only in part: without this, two equal ones one after the other
    can hold a fifth more than one. False where there was nothing, or another C library.
    """
    heap = _heap()
    return heap is not None and bool(heap.malloc_trim(0))


@cache
def _heap() -> ctypes.CDLL | None:
    """glibc, or None."""
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError, TypeError):  # TypeError: on Windows
        return None
    return library


@cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
