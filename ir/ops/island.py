"""Islands: regions of the model that no pass recognises, with the gradient that torch gives them.

Shapes: B sequences, T tokens. Inputs are activations (B, T, W), token ids (B, T), weights as their
slots have them, shared or one a sequence, and constants. program: what is computed, as
`tintc.ir.island` describes it. mask: of an island whose results depend on where a token stands,
the attention mask: padding is then put behind the sequence, where no earlier token sees it.
Gradients are exact: torch's own, traced when the model was compiled.
Source: docs/TINT.md section 2, "Islands".
"""

from __future__ import annotations

import torch
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.island import Island, Port, batched, read
from tintc.ir.node_meta import Shape
from tintc.ir.ops.rates import along
from tintc.ir.ops.shapes import demand, demand_rate, said
from tintc.ir.precision import wide


def _tokens(inputs: list[Shape], island: Island) -> Shape:
    """(B, T) of all inputs that have them, after comparing every input with its port."""
    demand(len(inputs) == len(island.inputs), f"an island has {len(inputs)} inputs")
    pairs = list(zip(inputs, island.inputs, strict=True))
    found = next(shape[:2] for shape, port in pairs if port.kind in ("tokens", "ids"))
    for shape, port in pairs:
        fits = {
            "tokens": shape == (*found, *port.shape),
            "ids": shape == found,
            "weight": shape in (port.shape, (found[0], *port.shape)),
            "constant": shape == port.shape,
        }
        demand(fits[port.kind], f"an island's input has shape {said(shape)}; expected {port}")
    return found


def _demand_mask(mask: Shape | None) -> None:
    demand(mask is None or len(mask) == 4, f"a mask has shape {said(mask or ())}")


def _forward_shape(inputs: list[Shape], mask: Shape | None, program: str) -> tuple[Shape, ...]:
    island = read(program)
    _demand_mask(mask)
    tokens = _tokens(inputs, island)
    return tuple((*tokens, width) for width in island.widths)


def _backward_shape(
    gradients: list[Shape | None],
    inputs: list[Shape],
    mask: Shape | None,
    program: str,
    wanted: list[int],
) -> tuple[Shape, ...]:
    island = read(program)
    _demand_mask(mask)
    tokens = _tokens(inputs, island)
    demand(len(gradients) == len(island.widths), f"an island has {len(gradients)} gradients")
    for dy, width in zip(gradients, island.widths, strict=True):
        demand(dy in (None, (*tokens, width)), f"an island's gradient has shape {dy}")
    learning = island.learning
    demand(wanted == sorted(set(wanted)), f"gradients {wanted} of an island are not in order")
    demand(set(wanted) <= set(learning), f"an island has no gradients {wanted}")
    ports = [island.inputs[i] for i in wanted]
    return tuple(
        (*(tokens if port.kind == "tokens" else tokens[:1]), *port.shape) for port in ports
    )


@operator(
    "(Tensor[] inputs, Tensor? mask, str program) -> Tensor[]",
    shape=_forward_shape,
    meaning="what no pass recognises, as torch computes it",
    takes={"mask": "bool", "inputs": "any"},
    weights=("inputs",),
    whole=True,
)
def island_forward(inputs: list[Tensor], mask: Tensor | None, program: str) -> list[Tensor]:
    """The island's results, each (B, T, W)."""
    island = read(program)
    order = _Order.of(mask)
    results = batched(island.forward, order.put(inputs, island.inputs), island.inputs)
    dtype = _dtype(inputs, island)
    return [order.back(result).to(dtype) for result in results]


@operator(
    "(Tensor?[] gradients, Tensor[] inputs, Tensor? mask, str program, int[] wanted) -> Tensor[]",
    shape=_backward_shape,
    meaning="gradients of an island's inputs",
    kind="backward",
    takes={"mask": "bool", "inputs": "any"},
    whole=True,
)
def island_backward(
    gradients: list[Tensor | None],
    inputs: list[Tensor],
    mask: Tensor | None,
    program: str,
    wanted: list[int],
) -> list[Tensor]:
    """Of the wanted inputs, by number: of an activation (B, T, W), of a weight the sum over the
    sequence's tokens, one a sequence. A gradient that is left out is 0.
    """
    island = read(program)
    order, dtype = _Order.of(mask), _dtype(inputs, island)
    first = next(x for x, port in zip(inputs, island.inputs, strict=True) if port.kind != "weight"
                 and port.kind != "constant")  # fmt: skip
    given = [
        first.new_zeros((*first.shape[:2], width), dtype=dtype) if dy is None else dy
        for dy, width in zip(gradients, island.widths, strict=True)
    ]
    ports = [*(Port("tokens", (width,)) for width in island.widths), *island.inputs]
    kept = frozenset(at for at, i in enumerate(island.learning) if i in wanted)
    found = batched(island.backward, order.put([*given, *inputs], ports), ports, kept)
    tokens = [island.inputs[i].kind == "tokens" for i in wanted]
    return [
        (order.back(dx) if has else dx).to(dtype) for dx, has in zip(found, tokens, strict=True)
    ]


def _descent_shape(weight: Shape, gradient: Shape, rate: Shape) -> Shape:
    demand(gradient[:1] == ("B",) or len(gradient) > 1, f"a gradient is {said(gradient)}")
    size = gradient[1:]
    demand(
        weight in (size, gradient),
        f"a weight has shape {said(weight)} and its gradient {said(gradient)}",
    )
    demand_rate(rate)
    return gradient


@operator(
    "(Tensor weight, Tensor gradient, Tensor rate) -> Tensor",
    shape=_descent_shape,
    meaning="W - rate times an island's gradient",
    kind="descent",
)
def island_descent(weight: Tensor, gradient: Tensor, rate: Tensor) -> Tensor:
    """W <- W - rate * g, one weight a sequence; g: what island_backward gives for it."""
    change = wide(gradient)
    return wide(weight) - along(rate, change, change.ndim - 1) * change


def _dtype(inputs: list[Tensor], island: Island) -> torch.dtype:
    """Of the results: that of the activations, or of the weights where there are none."""
    learning = [pair for pair in zip(inputs, island.inputs, strict=True) if pair[1].learns]
    return min(learning, key=lambda pair: pair[1].kind != "tokens")[0].dtype


class _Order:
    """The tokens that are no padding first, and back. place: where a token goes; None: as they
    stand.
    """

    def __init__(self, place_BT: Tensor | None) -> None:
        self.place_BT = place_BT
        self.from_BT: Tensor | None = None  # which token stands there
        if place_BT is not None:
            columns_BT = torch.ones_like(place_BT).cumsum(-1) - 1
            self.from_BT = torch.zeros_like(place_BT).scatter(1, place_BT, columns_BT)

    @classmethod
    def of(cls, mask_BxTT: Tensor | None) -> _Order:
        if mask_BxTT is None:
            return cls(None)
        seen_BT = mask_BxTT[:, 0, -1].to(torch.int64)  # by the last token: all but padding
        behind_BT = seen_BT.sum(-1, keepdim=True) + (1 - seen_BT).cumsum(-1)
        return cls(torch.where(seen_BT == 1, seen_BT.cumsum(-1), behind_BT) - 1)

    def put(self, values: list[Tensor], ports: tuple[Port, ...] | list[Port]) -> list[Tensor]:
        return [
            self._taken(value, self.from_BT) if port.kind in ("tokens", "ids") else value
            for value, port in zip(values, ports, strict=True)
        ]

    def back(self, value_BTW: Tensor) -> Tensor:
        return self._taken(value_BTW, self.place_BT)

    @staticmethod
    def _taken(value: Tensor, index_BT: Tensor | None) -> Tensor:
        if index_BT is None:
            return value
        index_BT = index_BT.expand(value.shape[0], -1)
        if value.ndim == 2:
            return torch.gather(value, 1, index_BT)
        return torch.gather(value, 1, index_BT.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
