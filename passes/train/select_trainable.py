"""Marks the prefix slots that descent updates.

    tint.prefix(W of a top-n block)   ->  the same node, trainable

Trained are, without `train`, all linear weights and biases in the top `config.layers` blocks
(`passes/analysis/blocks.py`), tables of tokens there and all weights there that an island reads,
the shifts of norms there and of the norm that reads the last block's output, and gains of norms
when `norm_update` is `all` (TINT.md section 2, "Which layers learn"); of such a norm in an island,
both. With `train`, what its patterns match, and nothing else. What `lr_scale` gives factor 0 is not
trained (section 7).
"""

from __future__ import annotations

import operator

from torch import fx

from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import UnsupportedModelError, UsageError
from tintc.ir.layout import Rows
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.elementwise import multiply, residual, scale
from tintc.ir.ops.embedding import embedding
from tintc.ir.ops.island import island_forward
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.ops.norm import norm_forward
from tintc.ir.pass_manager import graph_pass
from tintc.ir.selection import Selection, shortened
from tintc.passes.analysis.blocks import Blocks, find_blocks, parameter_of
from tintc.passes.analysis.island_norms import norm_weights
from tintc.passes.analysis.sublayers import activations, inside
from tintc.passes.train.chosen_weights import mark_chosen, parameters, read_through_slots


@graph_pass(
    requires=("tint_only",),
    ensures=("some_trainable",),
    writes=("blocks", "trained_blocks", "block_path", "block_parts"),
)
def select_trainable(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Raises UsageError when `layers` exceeds the blocks and for
    patterns that match nothing that can learn; UnsupportedModelError when no block has a weight
    that learns, or one is trained that the model also uses otherwise."""
    selection = Selection(context.config, context.aliases)
    selection.check(parameters(graph), parameters(graph, buffers=True))
    if context.config.train:
        _select_by_patterns(graph, context, selection)
    else:
        _select_blocks(graph, context, selection)
    _refuse_ambiguous(graph)
    return graph


def _select_by_patterns(graph: fx.Graph, context: Context, selection: Selection) -> None:
    mark_chosen(graph, selection)
    trained = {info(argument(n, "parameter")).parameter or "" for n in _trainable(graph)}
    if not trained:
        matched = [name for name in parameters(graph) if selection.matched(name)]
        raise UsageError(
            f"train matches {shortened(matched)} only, which no operator reads as a weight or "
            "lr_scale gives no rate; expected a pattern of weights that learn"
        )
    blocks = find_blocks(graph)
    learning = [part for part in blocks.parts if any(inside(name, part) for name in trained)]
    _learn(context, blocks, len(learning))


def _learn(context: Context, blocks: Blocks, trained: int) -> None:
    context.learn(
        blocks=len(blocks.parts),
        trained_blocks=trained,
        block_path=blocks.container,
        block_parts=() if blocks.container else blocks.parts,
    )


def _select_blocks(graph: fx.Graph, context: Context, selection: Selection) -> None:
    blocks = find_blocks(graph)
    count = len(blocks.parts)
    layers = context.config.layers or count
    if layers > count:
        where = f" in {blocks.container}" if blocks.container else ""
        raise UsageError(
            f"layers is {layers}; expected 1 to {count}, the blocks of this model{where}"
        )
    _learn(context, blocks, layers)
    trained, last = blocks.last(layers), blocks.last(1)
    for node in graph.nodes:
        if is_tint(node, linear_forward) and blocks.holds(node, trained):
            _mark(argument(node, "weight"), argument(node, "bias"))
        elif is_tint(node, norm_forward) and (
            blocks.holds(node, trained) or _reads_block(node, blocks, last)
        ):
            gamma = argument(node, "gamma") if context.config.norm_update == "all" else None
            _mark(gamma, argument(node, "beta"))
        elif is_tint(node, island_forward):
            weights = [n for n in argument(node, "inputs") if is_tint(n, prefix)]
            _mark(*(weight for weight in weights if _is_in(weight, blocks, trained)))
            # A final norm may be in one island with the end of the last block.
            if _reads_block(node, blocks, last) or inside(info(node).module, last):
                own = [w for w in norm_weights(node) if len(argument(w, "parameter").users) == 1]
                _mark(*own)
        elif is_tint(node, embedding) and _is_of(argument(node, "table"), trained):
            read_through_slots(graph, node, argument(node, "table"))
            _mark(argument(node, "table"))
    if not _trainable(graph):
        raise UnsupportedModelError(
            f"nothing to train: the top {layers} of {count} blocks hold no linear layer and no norm"
        )
    for node in _trainable(graph):
        name = info(argument(node, "parameter")).parameter or ""
        info(node).trainable = selection.factor(name) != 0
    if not _trainable(graph):
        raise UsageError(
            "lr_scale gives every weight that would be trained factor 0; expected one that learns"
        )


def _is_of(table: fx.Node, blocks: set[str]) -> bool:
    """Whether a table of tokens is a block's own weight."""
    record = info(table)
    own = table.op == "placeholder" and not record.buffer and len(table.users) == 1
    return own and inside((record.parameter or "").rpartition(".")[0], blocks)


def _trainable(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if info(node).trainable]


def _is_in(weight: fx.Node, blocks: Blocks, trained: set[str]) -> bool:
    """Whether an island's weight is one of these parts'."""
    return inside(info(weight).module if blocks.container else parameter_of(weight), trained)


def _reads_block(norm: fx.Node, blocks: Blocks, last: set[str]) -> bool:
    """Whether the norm stands behind the block and reads its output, through sums, activations and
    islands outside of blocks if need be.
    """

    def within(node: fx.Node) -> bool:
        return inside(info(node).module, last) or blocks.holds(node, last)

    if within(norm):
        return False
    stack = activations(norm)
    while stack:
        value = stack.pop()
        if within(value):
            return True
        through = is_tint(value, residual, multiply, scale, activation_forward, island_forward)
        stack += activations(value) if through or value.target is operator.getitem else []
    return False


def _refuse_ambiguous(graph: fx.Graph) -> None:
    """A trained slot holds the only copy of its rows: an embedding, a head or other slots may not
    read them too.
    """
    for slot in _trainable(graph):
        parameter = argument(slot, "parameter")
        for user in parameter.users:
            if user is slot or (is_tint(user, prefix) and not _rows(slot).overlaps(_rows(user))):
                continue
            where = info(user).source or "no source line"
            raise UnsupportedModelError(
                f"{info(parameter).parameter} is trained in {info(slot).slot} and read by "
                f"{user.name} ({where}) "
                "in another way, so its update would reach one of the two only; expected a trained "
                "weight to have one use"
            )


def _rows(read: fx.Node) -> Rows:
    return Rows(*(argument(read, name) for name in ("start", "stop", "period")))


def _mark(*slots: fx.Node | None) -> None:
    for slot in slots:
        if (
            slot is not None
            and is_tint(slot, prefix)
            and not info(argument(slot, "parameter")).buffer
        ):
            info(slot).trainable = True
