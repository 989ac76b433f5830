"""More steps than a graph holds: a standard Loop over the program of one step.

    slots = W_0 for each sequence, states = 0
    Loop (k = 0 .. N-1):  slots, states = step(slots, states, eta * factors[k])
    logits = forward pass under the slots

The body holds what depends on slots and states alone; frozen blocks, masks and positions run once,
in front of it. The file does not grow with the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tintc.compiler.onnx.elementwise import add, cast, mul
from tintc.compiler.onnx.graph import BATCH, Dim, Graph, Value, Values
from tintc.compiler.onnx.shapes import expand, gather
from tintc.ir.builder import before_step
from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import prefix
from tintc.ir.outputs import SLOTS, Output
from tintc.ir.precision import wide_dtype
from tintc.runtime.simulator import Simulator

Inputs = dict[str, Value | None]
Run = Callable[[Inputs, Choices, Values], dict[str, Any]]  # the outputs of one kind of call


def looped(simulator: Simulator, graph: Graph, inputs: Inputs, run: Run) -> Values:
    """Slot -> its value after all steps."""
    values = {
        slot: expand(graph, value, BATCH, *sizes)
        for slot, (value, sizes) in first_values(simulator, graph).items()
    }
    return steps_from(simulator.config, graph, inputs, run, Choices(from_states=True), 0, values)


def steps_from(
    config: SimulatorConfig,
    graph: Graph,
    inputs: Inputs,
    run: Run,
    kind: Choices,
    first: int,
    values: Values,
) -> Values:
    """Slot -> its value after all steps; `values` are those after the first few. kind: of a
    step's call, but for its outputs.
    """

    def step(number: Value, before: Values) -> Values:
        given = scheduled(config, graph, inputs, add(graph, number, first))
        return after(run(given, replace(kind, outputs=SLOTS), before), before)

    return graph.loop(config.steps - first, values, step)


def scheduled(config: SimulatorConfig, graph: Graph, inputs: Inputs, number: Value) -> Inputs:
    """The inputs of a step: eta times the schedule's factor."""
    factors = [config.schedule_factor(step) for step in range(config.steps)]
    rate = inputs["inner_lr"]
    assert rate is not None
    if all(factor == 1 for factor in factors):
        return inputs
    table = graph.constant(torch.tensor(factors, dtype=rate.dtype))
    return {**inputs, "inner_lr": mul(graph, rate, gather(graph, table, number))}


def after(found: dict[str, Any], before: Values) -> Values:
    """Slot -> its new value, in the order of the old ones."""
    made = {**found[Output.UPDATES], **found[Output.STATES]}
    return {slot: made[slot] for slot in before}


def first_values(simulator: Simulator, graph: Graph) -> dict[str, tuple[Value, tuple[Dim, ...]]]:
    """Slot -> (its value before the first step, which all sequences share, its sizes for one)."""
    weights, found = simulator.prefix.direct(), {}
    for slot, node in before_step(simulator.program.graph).items():
        sizes: tuple[Dim, ...] = tuple(size for size in info(node).shape if isinstance(size, int))
        dtype = simulator.own_dtype if sizes else wide_dtype(simulator.dtype)
        value = graph.constant(0, dtype)  # a state
        if is_tint(node, prefix):
            source, *rest = node.args
            name = info(source).parameter  # type: ignore[arg-type]
            assert name is not None
            rows = prefix(weights[name], *rest)  # type: ignore[arg-type]
            value = cast(graph, graph.weight(slot, rows), dtype)
        found[slot] = (value, sizes)
    return found
