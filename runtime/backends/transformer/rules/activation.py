"""Activations: one module each."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument
from tintc.ir.ops.activation import activation_backward, activation_forward
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule, width_of
from tintc.runtime.backends.transformer.modules import activation as modules
from tintc.runtime.backends.transformer.modules.parts import Layer


@transformer_rule(activation_forward)
def _forward(emitter: Emitter, node: fx.Node) -> None:
    sizes = {"kind": argument(node, "kind")}
    (x,) = emitter.ranges(node, "x")
    emitter.write(node, modules.ActivationForward, sizes, x, emitter.range(node))


@transformer_rule(activation_backward)
def _backward(emitter: Emitter, node: fx.Node) -> None:
    sizes = {"size": width_of(node), "kind": argument(node, "kind")}
    layer: type[Layer] = modules.ActivationBackwardExact
    if argument(node, "gradient") == "first_order":
        layer, sizes["scale"] = modules.ActivationBackward, argument(node, "scale")
    emitter.write(node, layer, sizes, *emitter.ranges(node, "dy", "x"), emitter.range(node))
