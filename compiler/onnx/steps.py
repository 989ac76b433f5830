"""More steps than a graph holds: a standard Loop over the program of one step.

    slots = W_0 for each sequence, states = 0
    Loop (k = 0 .. N-1):  slots, states = step(slots, states, eta * factors[k])
    logits = forward pass under the slots

The body holds what depends on slots and states alone; frozen blocks, masks and positions run once,
in front of it. The file does not grow with the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tintc.compiler.onnx.elementwise import mul
from tintc.compiler.onnx.graph import BATCH, Dim, Graph, Value, Values
from tintc.compiler.onnx.shapes import expand, gather
from tintc.ir.builder import before_step
from tintc.ir.choices import Choices
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import prefix
from tintc.ir.outputs import SLOTS, Output
from tintc.runtime.simulator import Simulator

Inputs = dict[str, Value | None]
Run = Callable[[Inputs, Choices, Values], dict[str, Any]]  # the outputs of one kind of call


def looped(simulator: Simulator, graph: Graph, inputs: Inputs, run: Run) -> Values:
    """Slot -> its value after all steps."""
    config, kind = simulator.config, Choices(SLOTS, from_states=True)
    factors = [config.schedule_factor(step) for step in range(config.steps)]

    def step(number: Value, before: Values) -> Values:
        found = run(
            {**inputs, "inner_lr": _scheduled(graph, inputs, factors, number)}, kind, before
        )
        after = {**found[Output.UPDATES], **found[Output.STATES]}
        return {slot: after[slot] for slot in before}

    return graph.loop(config.steps, _first(simulator, graph), step)


def _first(simulator: Simulator, graph: Graph) -> Values:
    """Slot -> its value before the first step, one for each sequence."""
    weights, found = simulator.prefix.direct(), {}
    for slot, node in before_step(simulator.program.graph).items():
        size: list[Dim] = [dim for dim in info(node).shape if isinstance(dim, int)]
        value = graph.constant(0, simulator.dtype)  # a state
        if is_tint(node, prefix):
            source, *rest = node.args
            name = info(source).parameter  # type: ignore[arg-type]
            assert name is not None
            rows = prefix(weights[name], *rest)  # type: ignore[arg-type]
            value = graph.weight(slot, rows)
        found[slot] = expand(graph, value, BATCH, *size)
    return found


def _scheduled(graph: Graph, inputs: Inputs, factors: list[float], number: Value) -> Value:
    """eta times the schedule's factor of a step."""
    rate = inputs["inner_lr"]
    assert rate is not None
    if all(factor == 1 for factor in factors):
        return rate
    table = graph.constant(torch.tensor(factors, dtype=rate.dtype))
    return mul(graph, rate, gather(graph, table, number))
