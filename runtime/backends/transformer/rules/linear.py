"""Linear layers: one module for each tile of the weight or bias; the head reads its table."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument
from tintc.ir.layout import Tile
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import (
    bias_descent,
    linear_backward,
    linear_descent,
    linear_forward,
    prefix,
)
from tintc.runtime.backends.transformer.emitter import (
    Emitter,
    Sizes,
    place_of,
    transformer_rule,
    width_of,
)
from tintc.runtime.backends.transformer.modules import embedding, inner_rule, linear
from tintc.runtime.backends.transformer.modules.parts import Layer, Range


@transformer_rule(prefix)
def _prefix(emitter: Emitter, node: fx.Node) -> None:
    name = info(node).slot or ""
    slot = emitter.layout.prefix[name]
    if slot.zero:  # the weight's original numbers, once more
        tiles = zip(slot.tiles, emitter.layout.prefix[slot.beside].tiles, strict=True)
        for index, (tile, source) in enumerate(tiles):
            page, part = emitter.first_pages[source.page], f"_tile_{index}"
            emitter.update(node, tile, inner_rule.Faded, {"factor": 1.0}, page, part=part)
    emitter.hold(node)


@transformer_rule(linear_forward)
def _forward(emitter: Emitter, node: fx.Node) -> None:
    x, weight, bias = (argument(node, name) for name in ("x", "weight", "bias"))
    if info(weight).slot is None:
        tables = emitter.inputs(node, "weight", "bias")
        ranges = emitter.range(x), emitter.range(node)
        emitter.write(node, embedding.HeadForward, {}, *tables, *ranges)
        return
    _through_tiles(emitter, node, linear.LinearForward, weight, x, "columns", "rows")
    if bias is not None:
        shift(emitter, node, bias)


@transformer_rule(linear_backward)
def _backward(emitter: Emitter, node: fx.Node) -> None:
    dy, weight = argument(node, "dy"), argument(node, "weight")
    if info(weight).slot is None:
        (table,), ranges = emitter.inputs(node, "weight"), (emitter.range(dy), emitter.range(node))
        emitter.write(node, embedding.HeadBackward, {}, table, *ranges)
        return
    _through_tiles(emitter, node, linear.LinearBackward, weight, dy, "rows", "columns")


@transformer_rule(linear_descent)
def _descent(emitter: Emitter, node: fx.Node) -> None:
    weight, dy, x = (argument(node, name) for name in ("weight", "dy", "x"))
    (rate,) = emitter.inputs(node, "rate")
    tiles, adds = emitter.descended(weight)
    for index, tile in enumerate(tiles):
        ranges = (
            emitter.range(dy, tile.rows.start, tile.rows.stop),
            emitter.range(x, tile.columns.start, tile.columns.stop),
        )
        sizes, part = {**_sizes(emitter, tile), "add": adds}, f"_tile_{index}"
        emitter.update(node, tile, linear.LinearDescent, sizes, *ranges, rate, part=part)
    emitter.hold(node)


@transformer_rule(bias_descent)
def _bias_descent(emitter: Emitter, node: fx.Node) -> None:
    bias, dy = argument(node, "bias"), argument(node, "dy")
    (rate,) = emitter.inputs(node, "rate")
    tiles, adds = emitter.descended(bias)
    for index, tile in enumerate(tiles):
        source, pieces = _along(emitter, dy, bias, tile)
        kind: type[Layer] = linear.BiasDescent
        sizes = _sizes(emitter, tile)
        if _is_vector(tile):
            kind, sizes = (
                linear.VectorDescent,
                {"size": source.stop - source.start, "pieces": pieces},
            )
        sizes["add"] = adds
        emitter.update(node, tile, kind, sizes, source, rate, part=f"_tile_{index}")
    emitter.hold(node)


def shift(emitter: Emitter, node: fx.Node, bias: fx.Node) -> None:
    """Adds a bias or a norm's shift to the node's range."""
    for index, tile in enumerate(emitter.tiles(bias)):
        result, pieces = _along(emitter, node, bias, tile)
        kind: type[Layer] = linear.BiasForward
        sizes = _sizes(emitter, tile)
        if _is_vector(tile):
            kind, sizes = (
                linear.VectorForward,
                {"size": result.stop - result.start, "pieces": pieces},
            )
        read, part = (emitter.pages[tile.page], place_of(tile)), f"_bias_tile_{index}"
        emitter.write(node, kind, sizes, *read, result, part=part)


def _through_tiles(
    emitter: Emitter,
    node: fx.Node,
    kind: type[Layer],
    weight: fx.Node,
    source: fx.Node,
    reads: str,
    writes: str,
) -> None:
    """One module a tile, from one axis of the weight to the other; tiles behind the first on the
    read axis add to its result.
    """
    for index, tile in enumerate(emitter.tiles(weight)):
        part, result = getattr(tile, reads), getattr(tile, writes)
        ranges = (
            emitter.range(source, part.start, part.stop),
            emitter.range(node, result.start, result.stop),
        )
        sizes = {**_sizes(emitter, tile), "add": part.start > 0}
        read = emitter.pages[tile.page], place_of(tile)
        emitter.write(node, kind, sizes, *read, *ranges, part=f"_tile_{index}")


def _along(emitter: Emitter, node: fx.Node, bias: fx.Node, tile: Tile) -> tuple[Range, int]:
    """(coordinates of an activation that a tile of a bias is for, how many pieces of them share
    it): one but for norms of heads.
    """
    pieces = width_of(node) // width_of(bias)
    if pieces == 1:
        return emitter.range(node, tile.rows.start, tile.rows.stop), 1
    return emitter.range(node), pieces


def _sizes(emitter: Emitter, tile: Tile) -> Sizes:
    pieces = -(-tile.row_width // emitter.layout.head_width)
    sizes = {"rows": tile.rows.size, "columns": tile.columns.size, "tokens": tile.tokens.size}
    return {**sizes, "rows_each": tile.groups, "pieces": pieces}


def _is_vector(tile: Tile) -> bool:
    """Whether one prefix token holds all rows of a single column: a gain, a shift, or the bias of a
    one-row tile.
    """
    return tile.tokens.size == 1 and tile.columns.size == tile.row_width == 1
