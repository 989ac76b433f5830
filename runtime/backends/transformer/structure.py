"""The structural constants of the transformer back end: its modules, which of them share one copy,
and their counts.

    none     every operator of every block, pass and step has modules of its own
    layers   blocks share: one copy of what stands at the same place of a block, in the same pass
             and step
    all      every two modules with equal constants are one

Sharing changes no result by one bit: equal constants are equal whoever holds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import fx, nn

from tintc.ir.dialect import tint_name
from tintc.ir.errors import UsageError
from tintc.ir.facts import ModelFacts
from tintc.ir.layout import Layout
from tintc.ir.named import Backend, Share
from tintc.ir.node_meta import info
from tintc.runtime.backends.transformer.modules.parts import Counted, position_code

BACKENDS: tuple[str, ...] = get_args(Backend)
SHARES: tuple[str, ...] = get_args(Share)


def check_backend(backend: str, share: str) -> None:
    """Raises UsageError for an unknown back end or way of sharing, or for sharing where there is
    nothing to share.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if share not in SHARES:
        raise UsageError(f"share is {share!r}; expected one of {', '.join(SHARES)}")
    if backend == "fused" and share != "none":
        raise UsageError(
            f"share is {share!r}, but the fused back end has no structural constants to share; use "
            "backend transformer"
        )


@dataclass(frozen=True)
class Use:
    """One use of a module: for which part (tile) of which node, and the module's kind and size.

    formula, sizes: the number of parameters as an expression, and what its letters stand for.
    numbers: its value, counted.
    owners: for each way of sharing, the name of the module that this use has; uses of one name
    count once.
    """

    node: str
    operator: str
    phase: str
    module: str
    formula: str
    sizes: dict[str, int]
    numbers: int
    owners: dict[str, str]


_RESERVED = {*dir(nn.ModuleDict()), *dir(fx.GraphModule), *dir(nn.Module())}


def unused_name(label: str, taken: Container[str]) -> str:
    """The label, made longer until no module has it: users' modules may be called `items` or
    `code`.
    """
    while label in _RESERVED or label in taken:
        label += "_"
    return label


class Structure(nn.Module):
    """All modules by name, and the position code. `uses` lists every use in program order, one for
    each tile of a weight.
    """

    def __init__(
        self,
        layout: Layout,
        share: str,
        facts: ModelFacts,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.share, self.width = share, layout.head_width
        self._facts, self._dtype, self._device = facts, dtype, device
        self.code = nn.Parameter(
            position_code(layout.prefix_tokens, self.width, dtype, device), requires_grad=False
        )
        self.layers = nn.ModuleDict()
        self.uses: list[Use] = []
        self._names: dict[tuple[str, Any], str] = {}  # (way of sharing, what must agree) -> owner
        self._own: set[str] = set()  # names that modules would have without sharing
        self._seen: Counter[Any] = Counter()  # uses so far of the same place of a block
        self._owner: dict[tuple[str, str], str] = {}  # (node, part) -> name of its module

    def get(self, node: fx.Node, part: str, layer: type[Counted], sizes: dict[str, Any]) -> str:
        """Name of the module for one part of a node, made or shared at its first use; d is added to
        the sizes.

        The same node and part always have the same module, so programs for different outputs share
        them.
        """
        if (node.name, part) not in self._owner:
            sizes = {**sizes, "width": self.width}
            constants = (layer, tuple(sorted(sizes.items())))
            own = unused_name(f"{node.name}{part}", self._own)
            self._own.add(own)
            keys = {
                "none": own,
                "layers": self._in_block(node, part, constants) or own,
                "all": constants,
            }
            owners = {
                share: self._names.setdefault((share, key), own) for share, key in keys.items()
            }
            owner = self._owner[node.name, part] = owners[self.share]
            if owner not in self.layers:
                with torch.device(self._device):
                    self.layers[owner] = layer(**sizes).to(self._dtype)
            self._note(node, owners)
        return self._owner[node.name, part]

    def _note(self, node: fx.Node, owners: dict[str, str]) -> None:
        module = self.layers[owners[self.share]]
        assert isinstance(module, Counted)
        numbers = sum(p.numel() for p in module.parameters())
        operator, phase = tint_name(node) or "", info(node).phase or ""
        self.uses.append(
            Use(
                node.name,
                operator,
                phase,
                type(module).__name__,
                module.formula,
                module.sizes,
                numbers,
                owners,
            )
        )

    def _in_block(self, node: fx.Node, part: str, constants: Any) -> Any:
        """Where in a block the use stands, the same for every block; None outside of blocks."""
        block, path = self._facts.place(info(node).module)
        if not block:
            return None
        place = (path, tint_name(node), info(node).phase, info(node).step, part, constants)
        self._seen[place, block] += 1  # a block may hold the same operator several times
        return place, self._seen[place, block]

    def numbers(self, share: str) -> int:
        """Parameters of all modules and the position code under one way of sharing; of
        `self.share`, those that there are.
        """
        each = {use.owners[share]: use.numbers for use in self.uses}
        return sum(each.values()) + self.code.numel()
