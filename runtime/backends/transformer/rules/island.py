"""Islands have no construction: the paper's modules are of what passes recognise."""

from __future__ import annotations

from torch import fx

from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.ops.island import island_backward, island_descent, island_forward
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule


@transformer_rule(island_forward, island_backward, island_descent)
def _island(emitter: Emitter, node: fx.Node) -> None:
    where = ", ".join(part for part in (info(node).module, info(node).source) if part)
    raise UnsupportedModelError(
        f"the transformer back end has no module for the island {node.name} ({where}), operators "
        "that no pass recognises; use the fused back end"
    )
