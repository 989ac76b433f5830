"""Sums, products and multiples of activations."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument
from tintc.ir.ops.elementwise import multiply, residual, scale
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule, width_of
from tintc.runtime.backends.transformer.modules import elementwise as modules


@transformer_rule(residual)
def _residual(emitter: Emitter, node: fx.Node) -> None:
    emitter.write(node, modules.Residual, {}, *emitter.ranges(node, "x", "y"), emitter.range(node))


@transformer_rule(multiply)
def _multiply(emitter: Emitter, node: fx.Node) -> None:
    sizes, ranges = {"size": width_of(node)}, emitter.ranges(node, "x", "y")
    emitter.write(node, modules.Multiply, sizes, *ranges, emitter.range(node))


@transformer_rule(scale)
def _scale(emitter: Emitter, node: fx.Node) -> None:
    sizes = {"factor": argument(node, "factor")}
    emitter.write(node, modules.Scale, sizes, *emitter.ranges(node, "x"), emitter.range(node))
