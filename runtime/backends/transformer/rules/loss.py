"""Where the backward pass starts."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument
from tintc.ir.ops.loss import loss_gradient, mean_embedding_gradient
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule
from tintc.runtime.backends.transformer.modules import embedding as modules


@transformer_rule(loss_gradient)
def _loss(emitter: Emitter, node: fx.Node) -> None:
    sizes, read = {"kind": argument(node, "kind")}, emitter.inputs(node, "targets", "mask")
    ranges = *emitter.ranges(node, "logits"), emitter.range(node)
    emitter.write(node, modules.LossGradient, sizes, *read, *ranges)


@transformer_rule(mean_embedding_gradient)
def _mean_embedding(emitter: Emitter, node: fx.Node) -> None:
    read = emitter.inputs(node, "weight", "targets", "mask")
    emitter.write(node, modules.MeanEmbeddingGradient, {}, *read, emitter.range(node))
