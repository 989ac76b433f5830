"""Rotary positions. The paper's modules have no cosine of what only the call knows."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.ops.position import at_length, rotary, wave
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule, width_of
from tintc.runtime.backends.transformer.modules import position as modules


@transformer_rule(rotary)
def _rotary(emitter: Emitter, node: fx.Node) -> None:
    sizes = {name: argument(node, name) for name in ("heads", "pairing", "transpose")}
    sizes["turned"] = width_of(argument(node, "cos"))
    ranges = *emitter.ranges(node, "x", "cos", "sin"), emitter.range(node)
    emitter.write(node, modules.Rotary, sizes, *ranges)


@transformer_rule(at_length, wave)
def _by_length(emitter: Emitter, node: fx.Node) -> None:
    where = ", ".join(part for part in (info(node).module, info(node).source) if part)
    raise UnsupportedModelError(
        f"the transformer back end has no module for rotary frequencies that depend on the length "
        f"of the call ({where}); use the fused back end"
    )
