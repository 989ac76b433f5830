"""Gives every activation a coordinate range of the input token, from the operator that makes it to
the last that reads it.

    x made by a forward or backward operator
      ->  context.layout.memory[x] = coordinates, from when to when, kept or not

Two activations interfere if they live at the same time, ends included: an operator's result never
lies where its arguments do. Ranges are handed out first fit over that graph, in order of creation,
so a later step reuses the coordinates of an earlier one. *Kept* are the forward activations that a
backward or descent operator reads.
"""

from __future__ import annotations

import dataclasses

import networkx as nx
from torch import fx

from tintc.ir.context import Context
from tintc.ir.contracts import activation_lives, is_kept
from tintc.ir.layout import MemorySlot, Range
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import graph_pass


@graph_pass(
    requires=("tint_only", "phases_in_order", "prefix_slots_disjoint"),
    ensures=("memory_slots_disjoint",),
    writes=("layout",),
)
def assign_memory_slots(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    lives = activation_lives(graph)
    coordinates = _first_fit(lives)
    names = [node.name for node in graph.nodes]
    slots = {
        n.name: MemorySlot(n.name, coordinates[n], names[lives[n].stop], is_kept(n)) for n in lives
    }
    assert context.layout is not None
    context.place(dataclasses.replace(context.layout, memory=slots))
    return graph


def _first_fit(lives: dict[fx.Node, Range]) -> dict[fx.Node, Range]:
    interference: nx.Graph[fx.Node] = nx.Graph()
    interference.add_nodes_from(lives)
    ordered = sorted(lives, key=lambda node: lives[node].start)
    active: list[fx.Node] = []
    for node in ordered:
        active = [other for other in active if lives[other].stop >= lives[node].start]
        interference.add_edges_from((node, other) for other in active)
        active.append(node)
    placed: dict[fx.Node, Range] = {}
    for node in ordered:
        size = info(node).shape[-1]
        assert isinstance(size, int)
        start = 0
        for taken in sorted(
            (placed[n] for n in interference[node] if n in placed), key=lambda r: r.start
        ):
            if taken.start >= start + size:
                break
            start = max(start, taken.stop)
        placed[node] = Range(start, start + size)
    return placed
