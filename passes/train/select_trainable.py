"""Marks the prefix slots that descent updates.

    tint.prefix(W of a top-n block)   ->  the same node, trainable

Blocks are the children of the outermost numbered container (`layers.0`, `layers.1`, ...) that holds
every attention (in a model without attention: every linear layer but the head). Trained: all linear
weights and biases in the top `config.layers` blocks, the shifts of norms there and of the norm that
reads the last block's output; gains of norms when `norm_update` is `all`. TINT.md section 2, "Which
layers learn".
"""

from __future__ import annotations

from torch import fx

from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import UnsupportedModelError, UsageError
from tintc.ir.layout import Rows
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.elementwise import multiply, residual, scale
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.ops.norm import norm_forward
from tintc.ir.pass_manager import graph_pass


@graph_pass(
    requires=("tint_only",),
    ensures=("some_trainable",),
    writes=("blocks", "trained_blocks", "block_path"),
)
def select_trainable(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Raises UsageError when `layers` exceeds the blocks,
    UnsupportedModelError when the model has no stack of blocks or trains a weight that it also uses
    otherwise."""
    container, blocks = _find_blocks(graph)
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
    _refuse_between(graph, {f"{container}.{index}" for index in blocks})
    _refuse_ambiguous(graph)
    if not any(info(node).trainable for node in graph.nodes):
        raise UnsupportedModelError(
            f"nothing to train: the top {layers} blocks in {container} hold no linear layer and no "
            "norm"
        )
    return graph


def _find_blocks(graph: fx.Graph) -> tuple[str, list[str]]:
    """(path of the container, its indices in order of execution).

    Raises UnsupportedModelError where there is no such container, and where it is not clear what a
    block is: children with linear layers beside those with the attentions, or a block that
    is itself a list of several.
    """
    anchors = [n for n in graph.nodes if is_tint(n, attention_forward)]
    layers = [
        n
        for n in graph.nodes
        if is_tint(n, linear_forward) and is_tint(argument(n, "weight"), prefix)
    ]
    anchors = anchors or layers
    paths = [info(node).module.split(".") for node in anchors]
    found = [
        (".".join(containers.pop()), list(dict.fromkeys(indices)))
        for depth in range(1, max((len(path) for path in paths), default=0))
        if len(containers := {tuple(path[:depth]) for path in paths}) == 1
        and len(indices := [path[depth] for path in paths if len(path) > depth]) == len(paths)
        and all(index.isdigit() for index in indices)
    ]
    if not found:
        seen = list(dict.fromkeys(".".join(path) or "the model itself" for path in paths))
        raise UnsupportedModelError(
            f"no stack of blocks: expected one ModuleList that holds the model's {len(anchors)} "
            "attention layers (or linear layers), as in model.layers.0, model.layers.1, ...; "
            f"{'they are in ' + ', '.join(seen[:3]) if seen else 'there are none'}"
        )
    # Where a whole stack is one child of a Sequential, the blocks are the children of the stack.
    container, blocks = next((one for one in found if len(one[1]) > 1), found[0])
    _refuse_flat(container, blocks, layers)
    _refuse_nested(container, anchors)
    return container, blocks


def _refuse_flat(container: str, blocks: list[str], layers: list[fx.Node]) -> None:
    """A child without attention, beside those with one, is half a block: which half belongs to
    which is not said.
    """
    for node in layers:
        index, _, _ = info(node).module.removeprefix(f"{container}.").partition(".")
        if _inside(info(node).module, {container}) and index.isdigit() and index not in blocks:
            raise UnsupportedModelError(
                f"{container}.{index} ({info(node).source or 'no source line'}) holds linear "
                f"layers but no attention, unlike {container}.{blocks[0]}; expected every block of "
                f"{container} to hold its attention and its feed-forward layers"
            )


def _refuse_nested(container: str, anchors: list[fx.Node]) -> None:
    """A child that is a list of blocks: what `layers = n` counts is not said."""
    inner: dict[str, set[str]] = {}
    for node in anchors:
        index, *rest = info(node).module.removeprefix(f"{container}.").split(".")
        numbered = next((part for part in rest if part.isdigit()), None)
        if numbered is not None and is_tint(node, attention_forward):
            inner.setdefault(index, set()).add(numbered)
    for index, numbers in inner.items():
        if len(numbers) > 1:
            raise UnsupportedModelError(
                f"{container}.{index} is itself a list of {len(numbers)} blocks; expected one "
                "ModuleList that holds every block, as in model.layers.0, model.layers.1, ..."
            )


def _inside(module: str, blocks: set[str]) -> bool:
    return any(module == block or module.startswith(block + ".") for block in blocks)


def _belongs(node: fx.Node, blocks: set[str]) -> bool:
    """Whether a layer is called in one of the blocks, or its parameters are theirs."""
    reads = [source for source in node.all_input_nodes if is_tint(source, prefix)]
    return any(_inside(info(part).module, blocks) for part in (node, *reads))


def _refuse_between(graph: fx.Graph, blocks: set[str]) -> None:
    """A layer with weights between two blocks, but in none, has no place in `layers = n`."""
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        if _inside(info(node).module, blocks) or any(
            source in behind for source in node.all_input_nodes
        ):
            behind.add(node)
    before: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _inside(info(node).module, blocks) or any(user in before for user in node.users):
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
    if _inside(info(norm).module, {block}):
        return False
    stack = [argument(norm, "x")]
    while stack:
        value = stack.pop()
        if _inside(info(value).module, {block}):
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
    for slot in [node for node in graph.nodes if info(node).trainable]:
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
