"""A batch in slices: sequences do not know of each other, so their activations need not all live at
once.

A slice is as many sequences as keep the products busy; more of them only need more memory. Memory
then grows with the batch by what is returned alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, TypeVar

import psutil
import torch
from torch import Tensor

from tintc.ir.calibration import Calibration
from tintc.ir.errors import MemoryLimitError, UsageError
from tintc.runtime.machine import hand_back_freed

NAME = "batch_slices"
Memory = Literal["auto", "lowest"] | int
_FREE = 0.8  # of the free memory may be taken
_LITTLE = 1 << 27  # bytes that nobody misses
_MUCH = 1 << 26  # bytes that are worth a few milliseconds
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

Key = TypeVar("Key", bound=str)
Widths = Collection[tuple[int, int]]  # inner size and columns of products


# Tokens of sequences with weights of their own, which share no product.
OWN_TOKENS = {"cpu": 128, "cuda": 32768}


def group_size(batch: int, tokens: int, device: str) -> int:
    """Rows of a stream that run together: those on a processor are as fast one after another, and
    need no copies to stand side by side.
    """
    return min(batch, max(1, OWN_TOKENS.get(device, OWN_TOKENS["cuda"]) // tokens))


def read_memory(given: str | int) -> Memory:
    """`auto`, `lowest`, or bytes: a whole number, or text such as 2GB or 512MiB. Raises
    UsageError.
    """
    text = str(given).strip().lower()
    if text in ("auto", "lowest") and isinstance(given, str):
        return "auto" if text == "auto" else "lowest"
    number = text.rstrip("kmgib")
    unit = text[len(number) :]
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1 or isinstance(given, bool):
        raise UsageError(
            f"memory is {given!r}; expected auto, lowest, or bytes above 0, as 2000000000 or 2GB"
        )
    return size


@dataclass(frozen=True)
class Work:
    """What a call asks for, each sequence alike.

    tokens: of the last forward pass. segment: of a training pass; `steps` of them go forward and
    back. widths: of the products that sequences share, which have a row for each token. held: the
    bytes that a call of so many sequences holds at its worst. trained: bytes of the weights that
    are trained.
    """

    tokens: int
    segment: int = 0
    steps: int = 0
    widths: Widths = ()
    held: Callable[[int], int] | None = None
    trained: int = 0


def slice_size(batch: int, work: Work, speed: Calibration, memory: Memory = "auto") -> int:
    """Sequences in a slice; slices are of about the same size.

    memory: `auto` is as many sequences as make the products faster, and as fit into most of what
    is free, on a processor also into half of what the gradients of a loop would take;
    `lowest` one at a time; bytes at most so many. Raises MemoryLimitError where one sequence holds
    more than these.
    """
    if memory == "lowest":
        return 1
    most, held = min(batch, _fast_enough(batch, work, speed)), work.held
    if held is not None:
        room = memory if isinstance(memory, int) else _room(speed.device, work.trained)
        while most > 1 and held(most) > room:
            most -= 1
        if isinstance(memory, int) and held(most) > room:
            raise MemoryLimitError(
                f"one sequence of {work.tokens} tokens needs about {held(1):,} bytes for "
                f"activations; memory is {memory:,}: expected at least that, shorter sequences, or "
                "memory='lowest', which tries"
            )
    return -(-batch // -(-batch // most))


def _room(device: str, trained: int) -> int:
    """Bytes that `auto` may take."""
    free = int(_FREE * _free(device))
    return min(free, max(trained // 2, _LITTLE)) if device == "cpu" else free


def _fast_enough(batch: int, work: Work, speed: Calibration) -> int:
    """The fewest sequences whose products are as fast as those of any more. What is less than that
    by little is not enough: what a slice costs beside its products is twice as much again.
    """
    if not speed.measured or not work.widths:
        return max(1, speed.full_rows(1, 1) // work.tokens)
    passes = [(work.tokens, 1), (work.segment, 2 * work.steps)]  # rows of a sequence, how often

    def slowness(sequences: int) -> float:
        """Of a sequence."""
        return math.fsum(
            often * rows * i * o * speed.slowness(sequences * rows, i, o)
            for rows, often in passes
            if rows and often
            for i, o in work.widths
        )

    tried = sorted({min(batch, 1 << k) for k in range(batch.bit_length() + 1)})
    return min(tried, key=slowness)  # the first of equals


def _free(device: str) -> int:
    if device == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free
    return int(psutil.virtual_memory().available)


def run_in_slices(
    run: Callable[[dict[str, Tensor]], dict[Key, Tensor]],
    tensors: dict[str, Tensor],
    batch: int,
    size: int,
    into: dict[Key, Tensor] | None = None,
    held: int = 0,
) -> dict[Key, Tensor]:
    """`run` on one slice of the tensors after another, its results put together. A tensor without a
    row for each sequence, such as the causal mask, goes to every slice. into: outputs, by name,
    that `run` writes into rows of one of the tensors, if it can. held: bytes of a slice at its
    worst; if they are many, what one frees is handed back before the next.
    """
    whole = dict(into or {})
    for start in range(0, batch, size):
        if start and held >= _MUCH:
            hand_back_freed()
        rows = slice(start, min(start + size, batch))
        part = run(
            {
                name: tensor[rows] if tensor.ndim and len(tensor) == batch else tensor
                for name, tensor in tensors.items()
            }
        )
        for name in list(part):
            # no name for the value here: it would outlive the next slice's peak
            _put(whole, name, part.pop(name), rows, batch)
    return whole


def _put(whole: dict[Key, Tensor], name: Key, value: Tensor, rows: slice, batch: int) -> None:
    if name not in whole:
        whole[name] = torch.empty((batch, *value.shape[1:]), dtype=value.dtype, device=value.device)
    if value.data_ptr() != whole[name][rows].data_ptr():
        whole[name][rows] = value
