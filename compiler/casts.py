"""`no_casts`: Hugging Face code without its casts to float32, so that a float64 model computes in
float64 throughout.

Norms, rotary tables and softmax of that code cast to float32 whatever the model's dtype is,
Falcon's ALiBi even to bfloat16. Against a float64 model this is noise that hides errors of its
size.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NAMED = (Tensor.float, Tensor.half, Tensor.bfloat16)
_active = contextvars.ContextVar("no_casts", default=False)


class _Wide(TorchFunctionMode):
    """Every cast to a narrower float becomes one to float64, and every new tensor of a narrower
    float is float64.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _NAMED:
            return args[0].double()
        options = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return function(*(_wide(value) for value in args), **options)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


@contextlib.contextmanager
def no_casts(on: bool = True) -> Iterator[None]:
    """Holds while a model runs and while torch.export traces it with strict=False; does nothing
    unless `on`.
    """
    if not on:
        yield
        return
    default, token = torch.get_default_dtype(), _active.set(True)
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(default)
        _active.reset(token)


def casts_removed() -> bool:
    """Whether `no_casts` holds here."""
    return _active.get()
