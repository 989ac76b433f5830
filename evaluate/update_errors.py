"""How far the update of a simulator is from the exact gradient, block by block and by kind of
parameter.

With g the exact gradient of one sequence's loss (a sum over targets, float64) and u = (W - W') /
eta what one step of a simulator takes away for a unit of its rate, over all numbers of a group of
parameters, a parameter that is not updated counting as u = 0:

    cosine = <u, g> / (|u| |g|);   relative error = |u - g| / |g|;   length = |u| / |g|

`tint` operators tell what a parameter is for, never its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, fx

from tintc.ir.builder import outputs
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.elementwise import residual
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.ops.norm import norm_forward
from tintc.runtime.simulator import Simulator

KINDS = ("query_key", "value_output", "feed_forward", "norm")
OUTSIDE = "final norm"  # what learns and is in no block

# log2 of the largest exact update. Far above the weights, so that rounding W' to their type leaves
# the digits of u; float16 ends at 2^16.
_LARGEST = {torch.float16: 6}
_LARGEST_OTHERWISE = 20


@dataclass
class Sums:
    """Of one group of parameters: <u, g>, |u|^2, |g|^2 and |u - g|^2."""

    dot: float = 0.0
    found: float = 0.0
    exact: float = 0.0
    difference: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            *(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )

    @property
    def cosine(self) -> float:
        """1 for the same direction; 0 where nothing is updated, which has none."""
        return (
            0.0
            if self.found == 0
            else _ratio(self.dot, math.sqrt(self.found) * math.sqrt(self.exact))
        )

    @property
    def relative_error(self) -> float:
        return _ratio(math.sqrt(self.difference), math.sqrt(self.exact))

    @property
    def length(self) -> float:
        return _ratio(math.sqrt(self.found), math.sqrt(self.exact))


def total(sums: Iterable[Sums]) -> Sums:
    """All groups as one."""
    return sum(sums, Sums())


@dataclass(frozen=True)
class Errors:
    """Sums of one sequence. layers: by the number of a block, counted from the lowest of the model,
    and OUTSIDE. kinds: by KINDS.
    """

    layers: dict[str, Sums] = field(default_factory=dict)
    kinds: dict[str, Sums] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, dict[str, float]]]) -> Errors:
        """Inverse of `to_dict`."""
        return cls(
            *(
                {name: Sums(**sums) for name, sums in values[part].items()}
                for part in ("layers", "kinds")
            )
        )


@dataclass(frozen=True)
class ExactGradient:
    """g of every trained slot on one sequence. In float32: rounded by 6e-8, far below any error
    that is measured, at half the memory.
    """

    slots: dict[str, Tensor]
    layers: dict[str, str]
    kinds: dict[str, str]

    @property
    def exponent(self) -> int:
        """e of the largest number, at most 2^e."""
        return math.frexp(max(float(gradient.abs().max()) for gradient in self.slots.values()))[1]


def exact_gradient(simulator: Simulator, ids_1T: Tensor, trained: int) -> ExactGradient:
    """The gradient of the loss on the first `trained` tokens. simulator: exact, in float64, of one
    step.
    """
    assert (
        simulator.config.is_exact
        and simulator.config.steps == 1
        and simulator.dtype == torch.float64
    )
    slots = {name: value.float() for name, value in _updates(simulator, ids_1T, trained, 1.0)}
    kinds = slot_kinds(simulator.program.graph)
    return ExactGradient(
        slots,
        {name: _layer(simulator, name) for name in slots},
        {name: kinds[name] for name in slots},
    )


def update_errors(
    simulator: Simulator, exact: ExactGradient, ids_1T: Tensor, trained: int
) -> Errors:
    """Of a simulator's one step on the same tokens. It holds one variant's updates and works slot
    by slot.
    """
    assert simulator.config.steps == 1
    rate = 2.0 ** (
        _LARGEST.get(simulator.dtype, _LARGEST_OTHERWISE) - exact.exponent
    )  # a power of 2: exact in every type
    sums = {
        name: _sums(exact.slots[name], value)
        for name, value in _updates(simulator, ids_1T, trained, rate)
    }
    sums |= {
        name: _sums(gradient, None) for name, gradient in exact.slots.items() if name not in sums
    }
    return Errors(_grouped(sums, exact.layers), _grouped(sums, exact.kinds))


def slot_kinds(graph: fx.Graph) -> dict[str, str]:
    """Slot -> one of KINDS, from where the layer that reads it stands.

    query_key, value_output: linear layers that an attention reads, and those that read an
    attention, through whatever has no weights (rotary embedding, gates, scales) and norms of
    queries and keys. norm: gains and shifts. feed_forward: all other linear layers.
    """
    linear = {node: "feed_forward" for node in graph.nodes if is_tint(node, linear_forward)}
    for attention in [node for node in graph.nodes if is_tint(node, attention_forward)]:
        for names, kind in ((("q", "k"), "query_key"), (("v",), "value_output")):
            linear |= {
                found: kind for name in names for found in _first_linear(argument(attention, name))
            }
    for node in linear:
        if _reads_attention(argument(node, "x")):
            linear[node] = "value_output"
    norms = {node: "norm" for node in graph.nodes if is_tint(node, norm_forward)}
    reads = [
        (source, kind) for node, kind in (linear | norms).items() for source in node.all_input_nodes
    ]
    return {
        name: kind
        for source, kind in reads
        if is_tint(source, prefix) and (name := info(source).slot) is not None
    }


def _first_linear(start: fx.Node) -> Iterator[fx.Node]:
    """Linear layers that a value comes from without another one, or a sum of residuals, between."""
    stack = [start]
    while stack:
        node = stack.pop()
        if is_tint(node, linear_forward):
            yield node
        elif not is_tint(node, residual, prefix) and node.op == "call_function":
            stack += node.all_input_nodes


def _reads_attention(start: fx.Node) -> bool:
    """Whether a value is an attention's, without a layer with weights or a sum of residuals
    between.
    """
    stack = [start]
    while stack:
        node = stack.pop()
        if is_tint(node, attention_forward):
            return True
        if (
            not is_tint(node, linear_forward, norm_forward, residual, prefix)
            and node.op == "call_function"
        ):
            stack += node.all_input_nodes
    return False


def _updates(
    simulator: Simulator, ids_1T: Tensor, trained: int, rate: float
) -> Iterator[tuple[str, Tensor]]:
    """(slot, (W - W') / rate in float64) of one step on the first `trained` tokens; each updated
    slot is let go of after its use.
    """
    ids = ids_1T[:, :trained]
    simulator.inner_lr.data.fill_(rate)
    tensors, slots = simulator.prefix.tensors(), simulator.program.layout.prefix
    assert set(outputs(simulator.program.graph)["updates"]) <= set(slots)
    with torch.inference_mode():
        updated = simulator.updates(ids, torch.ones_like(ids))
        for name in list(updated):
            slot = slots[name]
            before = prefix(
                tensors[slot.parameter],
                slot.rows.start,
                slot.rows.stop,
                slot.rows.period,
                slot.transpose,
            )
            yield name, (before.double() - updated.pop(name)[0].double()) / rate


def _layer(simulator: Simulator, slot: str) -> str:
    """The number of the block that holds a slot's parameter."""
    parameter = simulator.program.layout.prefix[slot].parameter
    return simulator.program.facts.place(parameter)[0] or OUTSIDE


def _sums(exact: Tensor, found: Tensor | None) -> Sums:
    """found: None where nothing is updated."""
    g = exact.double()
    if found is None:
        square = float(g.square().sum())
        return Sums(exact=square, difference=square)
    return Sums(
        *(
            float(x)
            for x in (
                (found * g).sum(),
                found.square().sum(),
                g.square().sum(),
                (found - g).square().sum(),
            )
        )
    )


def _grouped(sums: dict[str, Sums], groups: dict[str, str]) -> dict[str, Sums]:
    """Group -> sum over its slots, in the order of the model."""
    return {
        group: total(sums[name] for name in groups if groups[name] == group)
        for group in dict.fromkeys(groups.values())
    }


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
