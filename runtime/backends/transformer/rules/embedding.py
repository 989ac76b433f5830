"""Rows of tables, and what follows from inputs alone: the training segment and masks."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument, operator_of
from tintc.ir.errors import CompilerBug, UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import (
    embedding,
    embedding_descent,
    segment,
    segment_mask,
    without_padding,
)
from tintc.ir.ops.position import window_mask
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule
from tintc.runtime.backends.transformer.modules import embedding as modules


@transformer_rule(embedding)
def _embedding(emitter: Emitter, node: fx.Node) -> None:
    _refuse_learning(argument(node, "table"))
    sizes, read = {"offset": argument(node, "offset")}, emitter.inputs(node, "table", "index")
    emitter.write(node, modules.Embedding, sizes, *read, emitter.range(node))


@transformer_rule(embedding_descent, without_padding)
def _descent(emitter: Emitter, node: fx.Node) -> None:
    raise CompilerBug(f"{node.name} is of an embedding that learns, whose reading is refused")


def _refuse_learning(table: fx.Node) -> None:
    """Input tokens attend to no page by their ids: rows are read from a table."""
    if (slot := info(table).slot) is not None:
        raise UnsupportedModelError(
            f"{slot} is an embedding that learns, which the transformer back end cannot hold in "
            "prefix tokens; use the fused back end, or leave it out of train"
        )


@transformer_rule(segment, segment_mask, window_mask)
def _of_inputs(emitter: Emitter, node: fx.Node) -> None:
    """First tokens of an activation are a range of fewer tokens; of an input, a slice."""
    called = operator_of(node)
    assert called is not None
    if node.args[0] in emitter.values:
        args = fx.node.map_arg(node.args, emitter.values.__getitem__)
        emitter.values[node] = emitter.function(called.implementation, *args, name=node.name)
