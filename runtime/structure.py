"""The structural constants of the transformer back end: its modules, which of them share one copy, and their counts.

    none     every operator of every block, pass and step has modules of its own
    layers   blocks share: one copy of what stands at the same place of a block, in the same pass and step
    all      every two modules with equal constants are one

Sharing changes no result by one bit: equal constants are equal whoever holds them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from tintc.compiler.dialect import tint_name
from tintc.compiler.errors import UsageError
from tintc.compiler.layout import Layout
from tintc.compiler.node_meta import info
from tintc.runtime.modules.parts import Layer, position_code

Share = Literal["none", "layers", "all"]
SHARES: tuple[str, ...] = get_args(Share)


@dataclass(frozen=True)
class Use:
    """One use of a module: the operator's node, its kind and phase, the module's name, and how many parameters it has."""

    node: str
    operator: str
    phase: str
    module: str
    layer: str
    formula: str
    numbers: int


class Structure(nn.Module):
    """All modules by name, and the position code. `uses` lists every use in program order, one for each tile of a weight."""

    def __init__(self, layout: Layout, share: str, block_path: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        if share not in SHARES:
            raise UsageError(f"share is {share!r}; expected one of {', '.join(SHARES)}")
        self.share, self.width = share, layout.head_width
        self._block = re.compile(re.escape(block_path) + r"\.(\d+)(?=\.|$)") if block_path else None
        self._dtype, self._device = dtype, device
        self.code = nn.Parameter(position_code(layout.prefix_tokens, self.width, dtype, device), requires_grad=False)
        self.layers = nn.ModuleDict()
        self.uses: list[Use] = []
        self._names: dict[Any, str] = {}
        self._seen: Counter[Any] = Counter()
        self._of: dict[tuple[str, str], str] = {}

    def get(self, node: fx.Node, part: str, layer: type[Layer], sizes: dict[str, Any]) -> str:
        """Name of the module for one part of a node, made or shared at its first use; d is added to the sizes.

        The same node and part always have the same module, so programs for different outputs share them.
        """
        if (node.name, part) not in self._of:
            sizes = {**sizes, "width": self.width}
            key = self._key(node, part, (layer, tuple(sorted(sizes.items()))))
            if key not in self._names:
                name = self._names[key] = f"{node.name}{part}"
                self.layers[name] = layer(**sizes).to(device=self._device, dtype=self._dtype)
            self._of[node.name, part] = self._names[key]
            name = self._names[key]
            numbers = sum(p.numel() for p in self.layers[name].parameters())
            formula = str(getattr(layer, "formula", ""))
            self.uses.append(Use(node.name, tint_name(node) or "", info(node).phase or "", name, layer.__name__, formula, numbers))
        return self._of[node.name, part]

    def _key(self, node: fx.Node, part: str, constants: Any) -> Any:
        """What two uses must agree in to share a module."""
        if self.share == "all":
            return constants
        block = self._block.search(info(node).module) if self._block else None
        if self.share == "none" or block is None:
            return node.name, part
        path = info(node).module[: block.start(1)] + "*" + info(node).module[block.end(1) :]
        place = (path, tint_name(node), info(node).phase, info(node).step, part, constants)
        self._seen[place, block.group(1)] += 1  # a block may hold the same operator several times
        return place, self._seen[place, block.group(1)]
