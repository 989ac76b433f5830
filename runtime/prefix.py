"""The simulator's parameters: the auxiliary weights, under the auxiliary model's own names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tintc.ir.inputs import is_models_own
from tintc.ir.layout import PrefixSlot
from tintc.ir.ops.linear import as_matrix


def put_rows(parameter: Tensor, slot: PrefixSlot, value: Tensor) -> None:
    """Writes a slot's value into the rows of the auxiliary parameter that it stands for, in place;
    the inverse of `linear.prefix`.
    """
    parameter = as_matrix(parameter)
    rows = parameter.t() if slot.transpose else parameter
    own = torch.unflatten(rows, 0, (-1, slot.rows.period))[:, slot.rows.start : slot.rows.stop]
    own.copy_(torch.unflatten(value, 0, own.shape[:2]))


class PrefixEmbeddings(nn.Module):
    """A tree of modules that holds every entry of an auxiliary state dict, and what else a program
    reads, once.

    Its state dict has the auxiliary names (and `tintc.table_N`, `tintc.rms.NAME`), so
    `simulator.prefix.model.layers` looks like the model it simulates. Floating-point entries are
    parameters that an outer loss can train; others, tables of positions and the root mean squares
    of `rms` are buffers.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                child = owner._modules.get(part)
                if child is None:
                    child = nn.Module()
                    owner.add_module(part, child)
                owner = child
            if tensor.is_floating_point() and is_models_own(name):
                owner.register_parameter(leaf, nn.Parameter(tensor))
            else:
                owner.register_buffer(leaf, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """All entries by auxiliary name."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def direct(self) -> dict[str, Tensor]:
        """What operators read by auxiliary name: here everything."""
        return self.tensors()
