"""Norms: one module, whose gain is read from one prefix token; the shift is a bias."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument
from tintc.ir.ops.norm import norm_backward, norm_descent, norm_forward
from tintc.runtime.backends.transformer.emitter import (
    Emitter,
    Sizes,
    place_of,
    transformer_rule,
    width_of,
)
from tintc.runtime.backends.transformer.modules import norm as modules
from tintc.runtime.backends.transformer.modules.parts import Layer, Place
from tintc.runtime.backends.transformer.rules.linear import shift


@transformer_rule(norm_forward)
def _forward(emitter: Emitter, node: fx.Node) -> None:
    sizes, gain = _with_gain(emitter, node)
    x, beta = argument(node, "x"), argument(node, "beta")
    emitter.write(node, modules.NormForward, sizes, *gain, emitter.range(x), emitter.range(node))
    if beta is not None:
        shift(emitter, node, beta)


@transformer_rule(norm_backward)
def _backward(emitter: Emitter, node: fx.Node) -> None:
    sizes, gain = _with_gain(emitter, node)
    dy, x = emitter.ranges(node, "dy", "x")
    if sizes["kind"] == "scale":  # linear, and its own transpose
        emitter.write(node, modules.NormForward, sizes, *gain, dy, emitter.range(node))
        return
    layer: type[Layer] = modules.NormBackwardExact
    if argument(node, "gradient") == "first_order":
        layer, sizes["scale"] = modules.NormBackward, argument(node, "scale")
    emitter.write(node, layer, sizes, *gain, dy, x, emitter.range(node))


@transformer_rule(norm_descent)
def _descent(emitter: Emitter, node: fx.Node) -> None:
    (tile,), adds = emitter.descended(argument(node, "gamma"))
    (rate,), ranges = emitter.inputs(node, "rate"), emitter.ranges(node, "dy", "x")
    sizes = {**_sizes(node), "add": adds}
    emitter.update(node, tile, modules.NormDescent, sizes, *ranges, rate)
    emitter.hold(node)


def _sizes(node: fx.Node) -> Sizes:
    """Of a norm's forward, backward or descent."""
    pieces, eps, kind = (argument(node, name) for name in ("heads", "eps", "kind"))
    return {"size": width_of(argument(node, "x")), "pieces": pieces, "eps": eps, "kind": kind}


def _with_gain(
    emitter: Emitter, node: fx.Node
) -> tuple[Sizes, tuple[fx.Node | None, Place | None]]:
    """(sizes, (page, place) of the gain); nowhere for a norm that has none."""
    gamma = argument(node, "gamma")
    sizes = {**_sizes(node), "gain": gamma is not None, "offset": argument(node, "offset")}
    if gamma is None:
        return sizes, (None, None)
    (tile,) = emitter.tiles(gamma)
    return sizes, (emitter.pages[tile.page], place_of(tile))
