"""Rotary positions."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument
from tintc.ir.ops.position import rotary
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule, width_of
from tintc.runtime.backends.transformer.modules import position as modules


@transformer_rule(rotary)
def _rotary(emitter: Emitter, node: fx.Node) -> None:
    sizes = {name: argument(node, name) for name in ("heads", "pairing", "transpose")}
    sizes["turned"] = width_of(argument(node, "cos"))
    ranges = *emitter.ranges(node, "x", "cos", "sin"), emitter.range(node)
    emitter.write(node, modules.Rotary, sizes, *ranges)
