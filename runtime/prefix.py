"""The simulator's parameters: the auxiliary weights, under the auxiliary model's own names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class PrefixEmbeddings(nn.Module):
    """A tree of modules that holds every entry of an auxiliary state dict once.

    Its state dict has the auxiliary names, so `simulator.prefix.model.layers` looks like the model it simulates.
    Floating-point entries are parameters that an outer loss can train; others are buffers.
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
            if tensor.is_floating_point():
                owner.register_parameter(leaf, nn.Parameter(tensor))
            else:
                owner.register_buffer(leaf, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """All entries by auxiliary name."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def direct(self) -> dict[str, Tensor]:
        """What operators read by auxiliary name: here everything."""
        return self.tensors()
