"""Which weights of an island behind the last block are those of a final norm."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, fx

from tintc.ir.dialect import argument, is_tint
from tintc.ir.island import Island, Port, batched, read
from tintc.ir.ops.linear import prefix

_NEAR = 1e-2  # of the largest number: a norm's epsilon is seen
_TOKENS = 5


def norm_weights(island: fx.Node) -> list[fx.Node]:
    """Gains and shifts, vectors as wide as the activations; a number where it is the gain of a
    norm: what the island gives does not depend on how long the vectors are.
    """
    ports = read(argument(island, "program")).inputs
    widths = {port.shape for port in ports if port.kind == "tokens"}
    number = (1,) if _is_norm(argument(island, "program")) else None
    return [
        node
        for node, port in zip(argument(island, "inputs"), ports, strict=True)
        if is_tint(node, prefix) and (port.shape in widths or port.shape == number)
    ]


@lru_cache(maxsize=256)
def _is_norm(program: str) -> bool:
    island = read(program)
    widths = {port.shape for port in island.inputs if port.kind == "tokens"}
    weights = {port.shape for port in island.inputs if port.kind == "weight"}
    other = any(port.kind == "ids" for port in island.inputs)
    if other or len(widths) != 1 or not weights or widths != {(w,) for w in island.widths}:
        return False
    ((width,),) = widths
    if any(shape not in ((width,), (1,)) for shape in weights):
        return False  # a layer
    once, larger = (_run(island, factor) for factor in (1.0, 8.0))
    scale = max(float(y.abs().amax()) for y in once)
    same = all(
        float((x - y).abs().amax()) < _NEAR * scale for x, y in zip(once, larger, strict=True)
    )
    return same and all(float(y.std(1).amax()) > _NEAR * scale for y in once)


def _run(island: Island, factor: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def value(port: Port) -> Tensor:
        if port.kind == "tokens":
            shape = (1, _TOKENS, *port.shape)
            return factor * torch.randn(shape, generator=generator, dtype=torch.float64)
        return 0.5 + torch.rand(port.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        return batched(island.forward, [value(port) for port in island.inputs], island.inputs)
