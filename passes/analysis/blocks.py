"""Where a model's blocks are, and what belongs to which block.

Blocks are the children of the outermost numbered container (`layers.0`, `layers.1`, ...) that holds
every attention (in a model without attention: every linear layer but the head). Where there is no
such container, or a child of it is no whole block, they are found by the graph's own structure
(`passes/analysis/sublayers.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.elementwise import residual
from tintc.ir.ops.island import island_forward
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.ops.norm import norm_forward
from tintc.passes.analysis.last_layer import last_layer
from tintc.passes.analysis.sublayers import Parts, inside, repeated_blocks, steps_and_sums


@dataclass(frozen=True)
class Blocks:
    """In order of execution. container: of numbered children, the blocks; "" where there is none.
    parts: of each block, the paths of its modules; without a container also names of weights.
    """

    container: str
    parts: tuple[Parts, ...]

    def last(self, count: int) -> set[str]:
        """The parts of so many blocks at the end."""
        return {part for parts in self.parts[len(self.parts) - count :] for part in parts}

    def holds(self, node: fx.Node, parts: set[str]) -> bool:
        """Whether a layer is called in these parts, or its parameters are theirs."""
        reads = [source for source in node.all_input_nodes if is_tint(source, prefix)]
        if self.container:
            return any(inside(info(part).module, parts) for part in (node, *reads))
        return any(inside(parameter_of(read), parts) for read in (node, *reads))


def parameter_of(read: fx.Node) -> str:
    """Name of the parameter that a slot is read from; "" for another node."""
    return (info(argument(read, "parameter")).parameter or "") if is_tint(read, prefix) else ""


def find_blocks(graph: fx.Graph) -> Blocks:
    """The blocks of a model; none if it has no weights but embeddings and the head."""
    head = last_layer(graph)  # reads a slot where it is cut to the vocabulary
    attends = anchors = [n for n in graph.nodes if is_tint(n, attention_forward)]
    layers = [
        n
        for n in graph.nodes
        if is_tint(n, linear_forward) and is_tint(argument(n, "weight"), prefix) and n is not head
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
    if found:
        # Where a whole stack is one child of a Sequential, the blocks are the stack's children.
        container, indices = next((one for one in found if len(one[1]) > 1), found[0])
        every = _children(container, [n for n in graph.nodes if n in {*anchors, *layers}])
        if len(every) > len(indices) or not attends:
            indices = _whole(graph, container, indices, every)
        blocks = Blocks(container, tuple((f"{container}.{index}",) for index in indices))
        if indices and not _is_nested(container, anchors) and not _adds_outside(graph, blocks):
            return blocks
    container, parts = repeated_blocks(graph)
    return Blocks(container, tuple(parts))


def _read_by_islands(graph: fx.Graph) -> list[fx.Node]:
    """The weights of a model that has no recognised layer."""
    return [
        n
        for n in graph.nodes
        if is_tint(n, prefix) and any(is_tint(u, island_forward) for u in n.users)
    ]


def _children(container: str, nodes: list[fx.Node]) -> list[str]:
    """The numbered children of a container that these stand in, in their order."""
    inner = [info(n).module for n in nodes if inside(info(n).module, {container})]
    found = [name.removeprefix(container).lstrip(".").partition(".")[0] for name in inner]
    return [index for index in dict.fromkeys(found) if index.isdigit()]


def _whole(graph: fx.Graph, container: str, found: list[str], every: list[str]) -> list[str]:
    """The children that are blocks, of those found by attention or layers or of every one; none
    where a child that does not mix tokens is half a block, the feed-forward of the one beside it.
    Where those that mix have a feed-forward as well, it is a block of its own.
    """
    steps, sums = steps_and_sums(graph)
    parts = [f"{container}.{index}" for index in every]
    mixing = {
        next((p for name in names for p in parts if inside(name, {p})), "") for names in steps
    }
    mixing.discard("")
    if mixing and all(sum(inside(module, {part}) for module in sums) > 1 for part in mixing):
        return every
    return found if len(found) == len(every) and len(mixing) in (0, len(every)) else []


def _is_nested(container: str, anchors: list[fx.Node]) -> bool:
    """Whether a child is a list of blocks, or of heads."""
    inner: dict[str, set[str]] = {}
    for node in anchors:
        index, *rest = info(node).module.removeprefix(f"{container}.").split(".")
        numbered = next((part for part in rest if part.isdigit()), None)
        if numbered is not None and is_tint(node, attention_forward):
            inner.setdefault(index, set()).add(numbered)
    return any(len(numbers) > 1 for numbers in inner.values())


def _adds_outside(graph: fx.Graph, blocks: Blocks) -> bool:
    """Whether layers outside of the blocks are sublayers as well, x + f(x), or stand between two
    blocks.
    """
    parts = blocks.last(len(blocks.parts))
    for node in graph.nodes:
        if is_tint(node, residual) and not inside(info(node).module, parts):
            x, y = argument(node, "x"), argument(node, "y")
            if _is_layer(y, x, blocks, parts) or _is_layer(x, y, blocks, parts):
                return True
    return _between(graph, blocks, parts)


def _is_layer(branch: fx.Node, stream: fx.Node, blocks: Blocks, parts: set[str]) -> bool:
    """Whether the branch is computed from the stream, as it is or as it was one sum before, by
    layers of which none is in a block.
    """
    before = [stream, *(stream.all_input_nodes if is_tint(stream, residual) else [])]
    pending, seen, layers, joined = [branch], {branch}, 0, False
    while pending:
        node = pending.pop()
        joined = joined or node in before
        if node in before or node.op != "call_function":
            continue
        if inside(info(node).module, parts) or blocks.holds(node, parts):
            return False
        layers += is_tint(node, linear_forward) and is_tint(argument(node, "weight"), prefix)
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        pending += new
    return joined and layers > 0


def _between(graph: fx.Graph, blocks: Blocks, parts: set[str]) -> bool:
    """Whether a layer with weights stands between two blocks, but in none."""
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        if inside(info(node).module, parts) or any(n in behind for n in node.all_input_nodes):
            behind.add(node)
    before: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if inside(info(node).module, parts) or any(user in before for user in node.users):
            before.add(node)
    return any(
        is_tint(node, linear_forward, norm_forward)
        and node in behind
        and node in before
        and not blocks.holds(node, parts)
        for node in graph.nodes
    )
