"""Gives every activation that the backward pass or a descent reads a coordinate range beside the token.

    x kept from a forward module to its descent   ->   context.layout.memory[x] = coordinates, and from when to when

Two activations interfere if they are kept at the same time; ranges are handed out first fit over that graph,
in order of creation, so a later step reuses the coordinates of an earlier one.
"""

from __future__ import annotations

import dataclasses

import networkx as nx
from torch import fx

from tintc.compiler.contracts import kept_lives
from tintc.compiler.layout import MemorySlot, Range
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass


@graph_pass(requires=("tint_only", "phases_in_order", "prefix_slots_disjoint"), ensures=("memory_slots_disjoint",))
def assign_memory_slots(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    lives = kept_lives(graph)
    coordinates = _first_fit(lives)
    names = [node.name for node in graph.nodes]
    slots = {node.name: MemorySlot(node.name, coordinates[node], names[lives[node].stop]) for node in lives}
    assert context.layout is not None
    context.layout = dataclasses.replace(context.layout, memory=slots)
    return graph


def _first_fit(lives: dict[fx.Node, Range]) -> dict[fx.Node, Range]:
    interference: nx.Graph[fx.Node] = nx.Graph()
    interference.add_nodes_from(lives)
    ordered = sorted(lives, key=lambda node: lives[node].start)
    active: list[fx.Node] = []
    for node in ordered:
        active = [other for other in active if lives[other].stop > lives[node].start]
        interference.add_edges_from((node, other) for other in active)
        active.append(node)
    placed: dict[fx.Node, Range] = {}
    for node in ordered:
        size = info(node).shape[-1]
        assert isinstance(size, int)
        start = 0
        for taken in sorted((placed[n] for n in interference[node] if n in placed), key=lambda r: r.start):
            if taken.start >= start + size:
                break
            start = max(start, taken.stop)
        placed[node] = Range(start, start + size)
    return placed
