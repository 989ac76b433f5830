"""Gives every weight that a `tint.prefix` reads its place in prefix tokens, by the geometry of
`prefix_geometry`.

    tint.prefix(W)   ->   the same node; context.layout.prefix[slot] says where W lies

A tile of a linear layer is S * K rows of P heads of columns: token j has S of the rows, each padded
to whole heads, and one more head with the biases of these rows (docs/TINT.md sections 3 and 6; Tile
says which rows). A norm's gain and shift lie in one token; a token holds as many vectors as fit, a
page as many tokens as it has. Nothing has to divide. What the inner rule keeps beside a weight, its
states, its gradient and its original numbers, lies where the weight does, on pages of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from torch import fx

from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.layout import Layout, PrefixSlot, Range, Rows, Tile, beside
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_backward, linear_descent, linear_forward, prefix
from tintc.ir.ops.norm import norm_forward
from tintc.ir.pass_manager import graph_pass
from tintc.passes.place.prefix_geometry import Geometry, Matrix, Weights, solve, tiling

_READERS = (linear_forward, linear_backward, linear_descent)


@graph_pass(requires=("tint_only",), ensures=("prefix_slots_disjoint",), writes=("layout",))
def assign_prefix_slots(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Raises UsageError for a K, D_sim or H_sim that cannot work,
    with the nearest that can.
    """
    matrices, vectors = _collect(graph)
    kept = _beside(graph)
    reads = (argument(node, "weight") for node in graph.nodes if is_tint(node, *_READERS))
    uses = Counter(beside(slot) or slot for read in reads if (slot := info(read).slot))
    copies = Counter(map(beside, kept))
    weights = Weights(
        [
            Matrix(*_sizes(weight), uses[name], bias is not None, 1 + copies[name])
            for weight, bias in matrices
            if (name := info(weight).slot) is not None
        ],
        [_shape(read)[0] for read in vectors],
    )
    geometry = solve(weights, context.config)
    place = _Place(geometry)
    for weight, bias in matrices:
        place.matrix(weight, bias)
    for read in vectors:
        place.vector(read)
    for name, read in kept.items():
        place.keep(name, read)
    updated = _updated(graph)
    slots = {
        name: dataclasses.replace(slot, updated=name in updated)
        for name, slot in place.slots.items()
    }
    context.place(
        Layout(
            prefix_tokens=geometry.tokens,
            sim_hidden=geometry.heads * geometry.width,
            sim_heads=geometry.heads,
            pages=place.pages,
            prefix=slots,
        )
    )
    return graph


def _updated(graph: fx.Graph) -> set[str]:
    """The slots that some descent gives a new value."""
    returned = graph.output_node().args[0]
    return set(returned["updates"]) if isinstance(returned, dict) else set()


def _beside(graph: fx.Graph) -> dict[str, fx.Node]:
    """Slot -> its first value, of what the inner rule keeps beside weights."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        slot = info(node).slot
        if slot is not None and beside(slot):
            found.setdefault(slot, node)
    return found


def _collect(graph: fx.Graph) -> tuple[list[tuple[fx.Node, fx.Node | None]], list[fx.Node]]:
    """((weight, its own bias or None), vectors: of norms, and biases whose weight another layer
    has). Behind them tables that learn.
    """
    norms = [node for node in graph.nodes if is_tint(node, norm_forward)]
    reads = (argument(node, name) for node in norms for name in ("gamma", "beta"))
    vectors = list(
        dict.fromkeys(read for read in reads if read is not None and is_tint(read, prefix))
    )
    matrices: list[tuple[fx.Node, fx.Node | None]] = []
    seen: set[fx.Node] = set(vectors)  # a bias that is a norm's too lies where norms read it
    for node in graph.nodes:
        if not is_tint(node, linear_forward):
            continue
        weight, bias = argument(node, "weight"), argument(node, "bias")
        own = bias if bias is not None and is_tint(bias, prefix) and bias not in seen else None
        if is_tint(weight, prefix) and weight not in seen:
            matrices.append((weight, own))
        elif own is not None:
            vectors.append(own)
        seen |= {read for read in (weight, own) if read is not None}
    own_reads = [n for n in graph.nodes if is_tint(n, prefix) and not beside(info(n).slot or "")]
    further = [n for n in own_reads if n not in seen]
    matrices += [(node, None) for node in further if len(_shape(node)) == 2]
    vectors += [node for node in further if len(_shape(node)) == 1]
    return matrices, vectors


def _sizes(weight: fx.Node) -> tuple[int, int]:
    rows, columns = _shape(weight)
    return rows, columns


def _shape(read: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in info(read).shape)


class _Place:
    """Fills pages in order. pages: how many there are so far; slots: what lies where."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.slots: dict[str, PrefixSlot] = {}
        self.pages = 0
        self._token, self._start = (
            geometry.tokens,
            0,
        )  # where the next vector goes: no page is open yet
        self._beside: dict[tuple[str, int], int] = {}  # (kind, page of the weight) -> its page

    def matrix(self, weight: fx.Node, bias: fx.Node | None) -> None:
        """A page for each tile of the matrix; the biases of its rows stand once, in the first page
        that has the rows.
        """
        k, d = self.geometry.tokens, self.geometry.width
        rows, columns = _sizes(weight)
        groups, pieces = tiling(rows, columns, self.geometry)
        tiles, bias_tiles = [], []
        for top in range(0, rows, groups * k):
            for left in range(0, columns, pieces * d):
                part = (
                    Range(top, min(top + groups * k, rows)),
                    Range(left, min(left + pieces * d, columns)),
                )
                tokens = Range(0, min(k, part[0].size))
                used, width = math.ceil(part[0].size / tokens.size), math.ceil(part[1].size / d) * d
                tiles.append(Tile(self.pages, *part, tokens, Range(0, used * width), width))
                if left == 0:
                    bias_tiles.append(
                        Tile(
                            self.pages,
                            part[0],
                            Range(0, 1),
                            tokens,
                            Range(used * width, used * (width + 1)),
                            1,
                        )
                    )
                self.pages += 1
        self._add(weight, tiles)
        if bias is not None:
            self._add(bias, bias_tiles)

    def vector(self, read: fx.Node) -> None:
        """Coordinates of one token; of a new page's first token where the last page is full."""
        (size,) = _shape(read)
        if self._start + size > self.geometry.heads * self.geometry.width:
            self._token, self._start = self._token + 1, 0
        if self._token >= self.geometry.tokens:
            self._token, self._start = 0, 0
            self.pages += 1
        where = Range(self._token, self._token + 1), Range(self._start, self._start + size)
        self._add(read, [Tile(self.pages - 1, Range(0, size), Range(0, 1), *where, 1)])
        self._start += size

    def keep(self, name: str, read: fx.Node) -> None:
        """The places of the weight that it stands beside, on pages that hold this kind alone.

        The program copies a weight's original numbers from its pages, so they hold zeros at first,
        as states do.
        """
        weight, kind = self.slots[beside(name)], name.rpartition("/")[2]
        tiles = []
        for tile in weight.tiles:
            key = kind, tile.page
            if key not in self._beside:
                self._beside[key] = self.pages
                self.pages += 1
            tiles.append(dataclasses.replace(tile, page=self._beside[key]))
        of_another = is_tint(read, prefix) and kind != "original"
        parameter = info(argument(read, "parameter")).parameter if of_another else weight.parameter
        assert parameter is not None
        self.slots[name] = dataclasses.replace(
            weight, name=name, parameter=parameter, trainable=False, tiles=tuple(tiles),
            beside=weight.name, zero=not of_another,
        )  # fmt: skip

    def _add(self, read: fx.Node, tiles: list[Tile]) -> None:
        record, parameter = info(read), info(argument(read, "parameter"))
        assert record.slot is not None
        assert parameter.parameter is not None
        rows = Rows(*(argument(read, name) for name in ("start", "stop", "period")))
        self.slots[record.slot] = PrefixSlot(
            record.slot,
            parameter.parameter,
            rows,
            argument(read, "transpose"),
            _shape(read),
            record.trainable,
            tuple(tiles),
        )
