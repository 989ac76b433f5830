"""Marks the prefix slots that descent updates.

    tint.prefix(W of a top-n block)   ->  the same node, trainable

Trained are, without `train`, all linear weights and biases in the top `config.layers` blocks
(`passes/analysis/blocks.py`), tables of tokens there and all weights there that an island reads,
the shifts of norms there and of the norm that reads the last block's output, and gains of norms
when `norm_update` is `all` (TINT.md section 2, "Which layers learn"); with `train`, what its
patterns match, and nothing else. What `lr_scale` gives factor 0 is not trained (section 7).
"""

from __future__ import annotations

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
from tintc.passes.analysis.blocks import find_blocks, inside
from tintc.passes.train.chosen_weights import mark_chosen, parameters, read_through_slots


@graph_pass(
    requires=("tint_only",),
    ensures=("some_trainable",),
    writes=("blocks", "trained_blocks", "block_path"),
)
def select_trainable(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Raises UsageError when `layers` exceeds the blocks and for
    patterns that match nothing that can learn; UnsupportedModelError when the model has no stack
    of blocks, which `train` does not need, or trains a weight that it also uses otherwise."""
    selection = Selection(context.config, context.aliases)
    selection.check(parameters(graph), parameters(graph, buffers=True))
    if context.config.train:
        _select_by_patterns(graph, context, selection)
    else:
        _select_blocks(graph, context, selection)
    _refuse_ambiguous(graph)
    return graph


def _select_by_patterns(graph: fx.Graph, context: Context, selection: Selection) -> None:
    try:
        container, blocks = find_blocks(graph)
    except UnsupportedModelError:  # a stack of blocks is what `layers` counts; patterns need none
        container, blocks = "", []
    mark_chosen(graph, selection)
    trained = {info(argument(n, "parameter")).parameter or "" for n in _trainable(graph)}
    if not trained:
        matched = [name for name in parameters(graph) if selection.matched(name)]
        raise UsageError(
            f"train matches {shortened(matched)} only, which no operator reads as a weight or "
            "lr_scale gives no rate; expected a pattern of weights that learn"
        )
    learning = [i for i in blocks if any(inside(name, {f"{container}.{i}"}) for name in trained)]
    context.learn(blocks=len(blocks), trained_blocks=len(learning), block_path=container)


def _select_blocks(graph: fx.Graph, context: Context, selection: Selection) -> None:
    container, blocks = find_blocks(graph)
    layers = context.config.layers or len(blocks)
    if layers > len(blocks):
        raise UsageError(
            f"layers is {layers}; expected 1 to {len(blocks)}, the blocks of this model in "
            f"{container}"
        )
    context.learn(blocks=len(blocks), trained_blocks=layers, block_path=container)
    trained = {f"{container}.{index}" for index in blocks[-layers:]}
    last = f"{container}.{blocks[-1]}"
    for node in graph.nodes:
        if is_tint(node, linear_forward) and _belongs(node, trained):
            _mark(argument(node, "weight"), argument(node, "bias"))
        elif is_tint(node, norm_forward) and (_belongs(node, trained) or _reads_block(node, last)):
            gamma = argument(node, "gamma") if context.config.norm_update == "all" else None
            _mark(gamma, argument(node, "beta"))
        elif is_tint(node, island_forward):
            weights = [n for n in argument(node, "inputs") if is_tint(n, prefix)]
            _mark(*(weight for weight in weights if inside(info(weight).module, trained)))
        elif is_tint(node, embedding) and _is_of(argument(node, "table"), trained):
            read_through_slots(graph, node, argument(node, "table"))
            _mark(argument(node, "table"))
    _refuse_between(graph, {f"{container}.{index}" for index in blocks})
    if not _trainable(graph):
        raise UnsupportedModelError(
            f"nothing to train: the top {layers} blocks in {container} hold no linear layer and no "
            "norm"
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


def _belongs(node: fx.Node, blocks: set[str]) -> bool:
    """Whether a layer is called in one of the blocks, or its parameters are theirs."""
    reads = [source for source in node.all_input_nodes if is_tint(source, prefix)]
    return any(inside(info(part).module, blocks) for part in (node, *reads))


def _refuse_between(graph: fx.Graph, blocks: set[str]) -> None:
    """A layer with weights between two blocks, but in none, has no place in `layers = n`."""
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        if inside(info(node).module, blocks) or any(
            source in behind for source in node.all_input_nodes
        ):
            behind.add(node)
    before: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if inside(info(node).module, blocks) or any(user in before for user in node.users):
            before.add(node)
    for node in graph.nodes:
        if (
            is_tint(node, linear_forward, norm_forward)
            and node in behind
            and node in before
            and not _belongs(node, blocks)
        ):
            raise UnsupportedModelError(
                f"{info(node).module or node.name} ({info(node).source or 'no source line'}) "
                "stands between blocks but in none; "
                "expected every layer with weights between the first and the last block to be part "
                "of a block"
            )


def _reads_block(norm: fx.Node, block: str) -> bool:
    """Whether the norm stands behind the block and reads its output, through sums and activations
    outside of blocks if need be.
    """
    if inside(info(norm).module, {block}):
        return False
    stack = [argument(norm, "x")]
    while stack:
        value = stack.pop()
        if inside(info(value).module, {block}):
            return True
        stack += (
            value.all_input_nodes
            if is_tint(value, residual, multiply, scale, activation_forward)
            else []
        )
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
