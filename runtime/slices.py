"""A batch in slices: sequences do not know of each other, so their activations need not all live at
once.

A slice is as many sequences as keep the products busy; more of them only need more memory. Memory
then grows with the batch by what is returned alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

NAME = "batch_slices"
# Tokens that a product needs to run at full speed: measured on two cores, where 256 rows are nearly
# as fast as 2048.
TOKENS = {"cpu": 256, "cuda": 32768}

Key = TypeVar("Key", bound=str)


# Tokens of sequences with weights of their own, which share no product.
OWN_TOKENS = {"cpu": 128, "cuda": 32768}


def group_size(batch: int, tokens: int, device: str) -> int:
    """Rows of a stream that run together: those on a processor are as fast one after another, and
    need no copies to stand side by side.
    """
    return min(batch, max(1, OWN_TOKENS.get(device, OWN_TOKENS["cuda"]) // tokens))


def slice_size(batch: int, tokens: int, device: str) -> int:
    """Sequences in a slice; slices are of about the same size."""
    most = max(1, TOKENS.get(device, TOKENS["cuda"]) // tokens)
    return -(-batch // -(-batch // most))


def run_in_slices(
    run: Callable[[dict[str, Tensor]], dict[Key, Tensor]],
    tensors: dict[str, Tensor],
    batch: int,
    size: int,
    into: dict[Key, Tensor] | None = None,
) -> dict[Key, Tensor]:
    """`run` on one slice of the tensors after another, its results put together. A tensor without a
    row for each sequence, such as the causal mask, goes to every slice. into: outputs, by name,
    that `run` writes into rows of one of the tensors, if it can."""
    whole = dict(into or {})
    for start in range(0, batch, size):
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
