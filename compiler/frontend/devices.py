"""Devices and number types by name, as users write them."""

from __future__ import annotations

from typing import get_args

import torch

from tintc.ir.errors import UsageError
from tintc.ir.named import Number

DTYPES: tuple[str, ...] = get_args(Number)


def dtype_of(name: str | None) -> torch.dtype | None:
    """torch.float32 for `float32`; None for None. Raises UsageError for any other name."""
    if name is None:
        return None
    if name not in DTYPES:
        raise UsageError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def device_of(name: str | None) -> str | None:
    """The name, if this machine has such a device; None for None. Raises UsageError otherwise."""
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device is {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device is {name}; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return name
