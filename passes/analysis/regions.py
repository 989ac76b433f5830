"""Which captured operators no pass took, and how they fall into islands.

An operator is *carried* if its value depends on an activation or on the token ids; the others,
masks, positions and arithmetic of weights, are free: every island that reads one computes it. An
island is a connected region of carried operators that no path leaves and enters again: regions are
told apart by how many recognised operators stand between them and the input. What passes from one
to another, or to a recognised operator, is (batch, tokens, width); a value of another layout, or of
the token ids alone, is computed again where it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from tintc.ir.builder import input_node
from tintc.ir.dialect import is_recognized
from tintc.passes.analysis.evaluation import SIZE_ONLY, is_weight
from tintc.passes.analysis.patterns import calls, is_of_tokens


@dataclass
class Region:
    """nodes: what it computes, in order, free ones included. outputs: what others read. inputs:
    recognised activations, results of other regions and placeholders, in order.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)


def left(graph: fx.Graph) -> list[fx.Node]:
    """The operators that nothing recognised, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and not is_recognized(n)]


def carried(graph: fx.Graph) -> set[fx.Node]:
    """Those whose value depends on an activation or on the token ids."""
    ids, found = input_node(graph, "input_ids"), set()
    for node in left(graph):
        reads = node.all_input_nodes
        sizes_only = calls(node, *SIZE_ONLY)
        if not sizes_only and any(n is ids or n in found or is_recognized(n) for n in reads):
            found.add(node)
    return found


def regions(graph: fx.Graph) -> list[Region]:
    """All islands of a graph. Every operator that was left and that anybody needs is in one."""
    of_tokens = carried(graph)
    levels = _levels(graph, of_tokens)
    joined: nx.Graph[fx.Node] = nx.Graph()
    for node in of_tokens:
        joined.add_node(node)
        same = [n for n in node.all_input_nodes if n in of_tokens and levels[n] == levels[node]]
        joined.add_edges_from((source, node) for source in same)
    of: dict[fx.Node, int] = {}
    for number, part in enumerate(nx.connected_components(joined)):
        of |= dict.fromkeys(part, number)
    order = {node: i for i, node in enumerate(graph.nodes)}
    outputs: dict[int, list[fx.Node]] = {}
    for node in left(graph):
        outside = [user for user in node.users if _is_outside(user, node, of)]
        if outside:
            outputs.setdefault(of.get(node, -1 - order[node]), []).append(node)
    found = {own: _region(wanted, of, order) for own, wanted in outputs.items()}
    pending = list(found.values())
    while pending:  # what one computes again may begin with a value inside of another
        for node in pending.pop().inputs:
            if node in of and node not in (wanted := outputs.setdefault(of[node], [])):
                wanted.append(node)
                found[of[node]] = _region(wanted, of, order)
                pending.append(found[of[node]])
    return sorted(found.values(), key=lambda region: levels[region.outputs[0]])


def _levels(graph: fx.Graph, of_tokens: set[fx.Node]) -> dict[fx.Node, int]:
    """How often a path to a node goes from an operator that was left to a recognised one."""
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        steps = [
            levels[n] + (n in of_tokens and node not in of_tokens) for n in node.all_input_nodes
        ]
        levels[node] = max(steps, default=0)
    return levels


def _is_outside(user: fx.Node, node: fx.Node, of: dict[fx.Node, int]) -> bool:
    """Whether the value leaves its island for this reader."""
    if user.op == "output" or is_recognized(user):
        return True
    if node not in of or user not in of:
        return False
    return of[user] != of[node] and _crosses(node) and not calls(user, *SIZE_ONLY)


def _crosses(node: fx.Node) -> bool:
    """Whether the value can be an island's result."""
    if not is_of_tokens(node):
        return False
    value = node.meta.get("val")
    return (value is None or value.is_floating_point()) and learns(node)


def learns(node: fx.Node) -> bool:
    """Whether the value depends on an activation or a weight, and not on the token ids alone."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if is_recognized(current) or is_weight(current):
            return True
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += fresh
    return False


def _region(outputs: list[fx.Node], of: dict[fx.Node, int], order: dict[fx.Node, int]) -> Region:
    """All that these outputs need, back to recognised activations and results of other islands."""
    own = of.get(outputs[0])
    inside: set[fx.Node] = set()
    inputs: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node in inside:
            continue
        inside.add(node)
        read = node.all_input_nodes
        for source in read[1:] if calls(node, *SIZE_ONLY) else read:
            given = source in of and of[source] != own and _crosses(source)
            if source.op == "placeholder" or is_recognized(source) or given:
                inputs.add(source)
            else:
                pending.append(source)
    return Region(*(sorted(part, key=order.__getitem__) for part in (inside, outputs, inputs)))
