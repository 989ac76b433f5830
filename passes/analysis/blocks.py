"""Where a model's stack of blocks is, and what belongs to which block.

Blocks are the children of the outermost numbered container (`layers.0`, `layers.1`, ...) that holds
every attention (in a model without attention: every linear layer but the head).
"""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.island import island_forward
from tintc.ir.ops.linear import linear_forward, prefix


def find_blocks(graph: fx.Graph) -> tuple[str, list[str]]:
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
    anchors = anchors or layers or _read_by_islands(graph)
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


def _read_by_islands(graph: fx.Graph) -> list[fx.Node]:
    """The weights of a model that has no recognised layer."""
    return [
        n
        for n in graph.nodes
        if is_tint(n, prefix) and any(is_tint(u, island_forward) for u in n.users)
    ]


def _refuse_flat(container: str, blocks: list[str], layers: list[fx.Node]) -> None:
    """A child without attention, beside those with one, is half a block: which half belongs to
    which is not said.
    """
    for node in layers:
        index, _, _ = info(node).module.removeprefix(f"{container}.").partition(".")
        if inside(info(node).module, {container}) and index.isdigit() and index not in blocks:
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


def inside(module: str, blocks: set[str]) -> bool:
    return any(module == block or module.startswith(block + ".") for block in blocks)
