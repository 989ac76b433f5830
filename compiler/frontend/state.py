"""The weights of a model, each once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tintc.ir.errors import UnsupportedModelError


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with tied entries once, under the name that comes first, and the other
    names. Entries are tied if they are one tensor, or tensors of one memory: what trains one of
    them trains the other. Raises UnsupportedModelError for those that share a part of theirs.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[_Memory, str] = {}
    live = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for name in model.state_dict():
        tensor = live[name]
        key = _Memory.of(tensor)
        if key in first_name:
            aliases[name] = first_name[key]
        else:
            first_name[key] = name
            tensors[name] = tensor.detach()
    _refuse_overlaps(first_name, {n for n, t in live.items() if isinstance(t, nn.Parameter)})
    return tensors, aliases


class _Memory(NamedTuple):
    """Where a tensor's numbers are; numbers from `start` to `end` of a storage are its own."""

    storage: int
    start: int
    end: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Memory:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        start, size = int(tensor.storage_offset()), tensor.element_size()
        return cls(
            tensor.untyped_storage()._cdata,
            start * size,
            (start + span) * size,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )


def _refuse_overlaps(names: dict[_Memory, str], parameters: set[str]) -> None:
    """A step on one of two views of the same numbers would change the other as well."""
    reached: dict[int, tuple[int, str]] = {}  # storage -> how far, and by whom
    for memory, name in sorted(names.items(), key=lambda item: (item[0].storage, item[0].start)):
        end, other = reached.get(memory.storage, (0, ""))
        if memory.start < end and parameters & {name, other}:
            raise UnsupportedModelError(
                f"{other} and {name} are different views of the same memory, so that training one "
                "changes the other; expected weights with memory of their own (clone one of "
                "them), or one weight with two names"
            )
        reached[memory.storage] = max((end, other), (memory.end, name))
