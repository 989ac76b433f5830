"""FLOPs and bytes of every node of a program, counted as `cost.py` counts those of a whole call.

Bytes are what the torch operators behind a node read and write, each by itself: an upper limit of
what reaches the memory, since caches and fused kernels keep some. Views move none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tintc.compiler.cost import (
    Meter,
    Walk,
    inputs_without_numbers,
    plain_call,
    weights_without_numbers,
    without_numbers,
)
from tintc.ir.call_sizes import CallSizes, length
from tintc.ir.node_meta import info
from tintc.ir.precision import computed_dtype
from tintc.runtime.simulator import Simulator


@dataclass(frozen=True)
class NodeCost:
    """Of one run of a node. shape: of its result at these sizes, where that is one tensor."""

    flops: int
    bytes: int
    shape: tuple[int, ...] | None = None


NodeCosts = Mapping[str, NodeCost]  # by the node's name; placeholders have none


def graph_costs(
    graph: fx.Graph, dtype: torch.dtype, sizes: CallSizes, *, steps: int = 1
) -> NodeCosts:
    """Of a graph of `tint` operators: canonical, lowered or optimized. steps: of which it is given
    the factors of updates.
    """
    module = fx.GraphModule(nn.Module(), graph)
    with without_numbers("fused") as device, torch.no_grad():
        computed = computed_dtype(dtype, device)
        placeholders = graph.find_nodes(op="placeholder")
        return _run(module, [_value(node, computed, sizes, device, steps) for node in placeholders])


def emitted_costs(simulator: Simulator, sizes: CallSizes) -> NodeCosts:
    """Of the program that such a call of this simulator runs, `Simulator.emitted`."""
    program, dtype = simulator.program, simulator.dtype
    with without_numbers(simulator.backend) as device, torch.no_grad():
        weights = weights_without_numbers(program, dtype)
        inputs = inputs_without_numbers(program, sizes["batch"], sizes["tokens"], dtype, device)
        call = plain_call(inputs, sizes["segment"], "all")
        if simulator.structure is None:  # what is counted was emitted to be shown, too
            plain = simulator.on(weights, torch.empty((), dtype=torch.float64))
        else:
            plain = Simulator(program, weights, backend=simulator.backend, share="all")
        return _run(*plain.bound(call))


def _run(module: fx.GraphModule, arguments: list[Any]) -> NodeCosts:
    counted = _Counted(module, Meter())
    with counted.meter:
        counted.run(*arguments)
    return counted.found


class _Counted(Walk):
    """found: the cost of each node that ran."""

    def __init__(self, module: fx.GraphModule, meter: Meter) -> None:
        super().__init__(module, meter)
        self.found: dict[str, NodeCost] = {}

    def run_node(self, n: fx.Node) -> Any:
        flops, moved = self.meter.flops, self.meter.moved
        result = super().run_node(n)
        if n.op.startswith("call_"):
            shape = tuple(result.shape) if isinstance(result, Tensor) else None
            cost = NodeCost(self.meter.flops - flops, self.meter.moved - moved, shape)
            self.found[n.name] = cost
        return result


def _value(node: fx.Node, dtype: torch.dtype, sizes: CallSizes, device: str, steps: int) -> Any:
    """A tensor without numbers for a placeholder, by its recorded shape; the segment's length is a
    number.
    """
    if node.name == "segment":
        return sizes["segment"]
    record = info(node)
    number = torch.float64 if node.name == "inner_lr" else dtype  # the rate has a type of its own
    kinds = {"int": torch.int64, "bool": torch.bool, "float": number}
    # factors have a row for each training token of all steps
    shape = [
        steps * sizes["segment"] if size == "F" else length(sizes, size) for size in record.shape
    ]
    return torch.empty(shape, dtype=kinds[record.dtype], device=device)
