"""Rows of tables, and what follows from inputs alone: the training segment and masks."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument, operator_of
from tintc.ir.ops.embedding import embedding, segment, segment_mask
from tintc.ir.ops.position import window_mask
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule
from tintc.runtime.backends.transformer.modules import embedding as modules


@transformer_rule(embedding)
def _embedding(emitter: Emitter, node: fx.Node) -> None:
    sizes, read = {"offset": argument(node, "offset")}, emitter.inputs(node, "table", "index")
    emitter.write(node, modules.Embedding, sizes, *read, emitter.range(node))


@transformer_rule(segment, segment_mask, window_mask)
def _of_inputs(emitter: Emitter, node: fx.Node) -> None:
    """First tokens of an activation are a range of fewer tokens; of an input, a slice."""
    called = operator_of(node)
    assert called is not None
    if node.args[0] in emitter.values:
        args = fx.node.map_arg(node.args, emitter.values.__getitem__)
        emitter.values[node] = emitter.function(called.implementation, *args, name=node.name)
