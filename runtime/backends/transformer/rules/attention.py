"""Self-attention: one module for all heads."""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.dialect import argument
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
)
from tintc.runtime.backends.transformer.emitter import Emitter, Sizes, transformer_rule, width_of
from tintc.runtime.backends.transformer.modules import attention as modules
from tintc.runtime.backends.transformer.modules.parts import Layer


@transformer_rule(attention_forward)
def _forward(emitter: Emitter, node: fx.Node) -> None:
    reads, result = ("q", "k", "v"), emitter.range(node)
    _attend(emitter, node, modules.AttentionForward, argument(node, "v"), reads, result)


@transformer_rule(attention_backward_value)
def _value(emitter: Emitter, node: fx.Node) -> None:
    reads, result = ("do", "q", "k"), emitter.range(node)
    _attend(emitter, node, modules.AttentionBackwardValue, node, reads, result)


@transformer_rule(attention_backward_full)
def _full(emitter: Emitter, node: fx.Node) -> None:
    items = {item.args[1]: item for item in node.users if item in emitter.needed}
    results = tuple(emitter.range(items[i]) if i in items else None for i in range(3))
    reads = ("do", "q", "k", "v")
    _attend(emitter, node, modules.AttentionBackwardFull, argument(node, "v"), reads, results)


def _attend(
    emitter: Emitter,
    node: fx.Node,
    kind: type[Layer],
    values: fx.Node,
    reads: tuple[str, ...],
    result: Any,
) -> None:
    """values: the node that has as many coordinates as v."""
    bias = argument(node, "bias")
    sizes: Sizes = {
        name: argument(node, name) for name in ("heads", "kv_heads", "scale", "softcap")
    }
    sizes["bias"] = bias is not None
    widths = {"queries": argument(node, "q"), "keys": argument(node, "k"), "values": values}
    sizes |= {name: width_of(source) for name, source in widths.items()}
    (mask,) = emitter.inputs(node, "mask")
    of_keys = None if bias is None else emitter.range(bias)
    emitter.write(node, kind, sizes, mask, of_keys, *emitter.ranges(node, *reads), result)
