"""Inner rules: modules over the pages of a weight and of its states, tile by tile, and the numbers
that steps are multiplied by, which travel as the learning rate does: beside the tokens.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.dialect import argument, operator_of
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.layout import Tile
from tintc.ir.node_meta import info
from tintc.ir.ops import rates, states
from tintc.runtime.backends.transformer.emitter import (
    Emitter,
    Sizes,
    place_of,
    transformer_rule,
    width_of,
)
from tintc.runtime.backends.transformer.modules import inner_rule as modules

_CONSTANTS = {
    rates.clip_factor: ("limit",),
    rates.normal_factor: ("numbers",),
    rates.drift_share: ("limit",),
}


@transformer_rule(rates.rate, states.zero_count, states.next_count)
def _of_inputs(emitter: Emitter, node: fx.Node) -> None:
    """Scaled, or counted by what inputs alone decide."""
    called = operator_of(node)
    assert called is not None
    args = fx.node.map_arg(node.args, emitter.values.__getitem__)
    emitter.values[node] = emitter.function(called.implementation, *args, name=node.name)


@transformer_rule(states.zero_state)
def _zero(emitter: Emitter, node: fx.Node) -> None:
    """Of a state, what its pages hold at first; a descent from another replaces what they hold."""
    slot = info(node).slot or ""
    if slot in emitter.states and not emitter.holds_any(slot):
        emitter.hold(node)


# Pages


@transformer_rule(states.fade)
def _fade(emitter: Emitter, node: fx.Node) -> None:
    sizes = {"factor": argument(node, "factor")}
    _rewrite(emitter, node, modules.Faded, sizes, argument(node, "state"))


@transformer_rule(states.descend)
def _descend(emitter: Emitter, node: fx.Node) -> None:
    emitter.tiles(argument(node, "value"))
    sources = (argument(node, "direction"),)
    _rewrite(emitter, node, modules.Descended, {}, *sources, more=emitter.inputs(node, "rate"))


@transformer_rule(states.toward)
def _toward(emitter: Emitter, node: fx.Node) -> None:
    emitter.tiles(argument(node, "value"))
    sizes, each = {"share": argument(node, "share")}, emitter.inputs(node, "each")
    _rewrite(emitter, node, modules.Toward, sizes, argument(node, "anchor"), more=each, sized=True)


@transformer_rule(states.moment)
def _moment(emitter: Emitter, node: fx.Node) -> None:
    sizes = {name: argument(node, name) for name in ("beta", "squared")}
    sources = argument(node, "state"), argument(node, "gradient")
    _rewrite(emitter, node, modules.Moment, sizes, *sources, sized=True)


@transformer_rule(states.divide)
def _divide(emitter: Emitter, node: fx.Node) -> None:
    sources = argument(node, "gradient"), argument(node, "statistics")
    sizes = {"eps": argument(node, "eps")}
    _rewrite(emitter, node, modules.Quotient, sizes, *sources, sized=True)


@transformer_rule(states.adam_descent)
def _adam(emitter: Emitter, node: fx.Node) -> None:
    emitter.tiles(argument(node, "value"))
    sources = argument(node, "first"), argument(node, "second")
    sizes = {name: argument(node, name) for name in ("beta1", "beta2", "eps")}
    more = emitter.inputs(node, "count", "rate")
    _rewrite(emitter, node, modules.AdamDescent, sizes, *sources, more=more, sized=True)


def _rewrite(
    emitter: Emitter,
    node: fx.Node,
    kind: type[modules.PageLayer],
    sizes: Sizes,
    *sources: fx.Node,
    more: list[Any] | None = None,
    sized: bool = False,
) -> None:
    """One module for each tile of the node's slot, which reads the same tile of each source, and
    `more`. sized: its constants depend on the tile's width.
    """
    tiles = [emitter.tiles(source) for source in sources]
    for index, (tile, *read) in enumerate(zip(emitter.places(node), *tiles, strict=True)):
        pages = [emitter.pages[source.page] for source in read]
        args, part = (*pages, *(more or ())), f"_tile_{index}"
        emitter.update(
            node, tile, kind, {**sizes, **(_size(tile) if sized else {})}, *args, part=part
        )
    emitter.hold(node)


def _size(tile: Tile) -> Sizes:
    return {"size": tile.coordinates.size}


# Numbers


@transformer_rule(states.gradient_square, states.original_square)
def _square(emitter: Emitter, node: fx.Node) -> None:
    (page,) = node.all_input_nodes
    _sum_tiles(emitter, node, page)


@transformer_rule(states.change_square)
def _change(emitter: Emitter, node: fx.Node) -> None:
    _sum_tiles(emitter, node, argument(node, "value"), argument(node, "anchor"))


def _sum_tiles(emitter: Emitter, node: fx.Node, *sources: fx.Node) -> None:
    parts = []
    tiles = zip(*(emitter.tiles(source) for source in sources), strict=True)
    for index, (tile, *other) in enumerate(tiles):
        pages = [emitter.pages[each.page] for each in (tile, *other)]
        sizes, args = {**_size(tile), "of_change": bool(other)}, (place_of(tile), *pages)
        part = f"_tile_{index}"
        parts.append(
            emitter.number(node, modules.PageSquare, sizes, emitter.code, *args, part=part)
        )
    _add(emitter, node, parts)


@transformer_rule(states.linear_square)
def _of_tokens(emitter: Emitter, node: fx.Node) -> None:
    dy, x = argument(node, "dy"), argument(node, "x")
    sizes, ranges = (
        {"outputs": width_of(dy), "inputs": width_of(x)},
        emitter.ranges(node, "dy", "x"),
    )
    stream = emitter.stream, emitter.code
    emitter.values[node] = emitter.number(node, modules.TokenSquare, sizes, *stream, *ranges)


@transformer_rule(rates.total)
def _total(emitter: Emitter, node: fx.Node) -> None:
    _add(emitter, node, [emitter.values[part] for part in argument(node, "parts")])


def _add(emitter: Emitter, node: fx.Node, parts: list[fx.Node]) -> None:
    sizes = {"parts": len(parts)}
    emitter.values[node] = (
        parts[0] if len(parts) == 1 else emitter.number(node, modules.Total, sizes, *parts)
    )


@transformer_rule(rates.clip_factor, rates.normal_factor, rates.drift_share)
def _of_numbers(emitter: Emitter, node: fx.Node) -> None:
    called = operator_of(node)
    assert called is not None
    constants = tuple(argument(node, name) for name in _CONSTANTS[called])
    sizes = {"function": called.implementation, "constants": constants}
    numbers = (emitter.values[number] for number in node.args if isinstance(number, fx.Node))
    emitter.values[node] = emitter.number(node, modules.OfNumbers, sizes, *numbers)


@transformer_rule(states.orthogonal, states.rows)
def _refused(emitter: Emitter, node: fx.Node) -> None:
    raise UnsupportedModelError(
        "optimizer muon needs linear attention of a weight's pages to themselves, which the "
        "transformer back end does not have; use backend fused, or another optimizer"
    )
