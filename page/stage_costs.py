"""What the nodes of a stage cost in the call that reports tell of."""

from __future__ import annotations

from pathlib import Path

from tintc.compiler.artifact import malformed
from tintc.compiler.artifact_schema import GRAPH
from tintc.compiler.node_costs import NodeCosts, emitted_costs, graph_costs
from tintc.compiler.stages import stage_records
from tintc.ir.call_sizes import call_sizes
from tintc.ir.named import Stage
from tintc.ir.records import NodeRecord, from_records, to_records
from tintc.runtime.simulator import Simulator


def stage_parts(simulator: Simulator, stage: Stage) -> tuple[list[NodeRecord], NodeCosts]:
    """The records of a stage, and what its nodes cost; an optimized graph is made once for both."""
    if stage != "optimized":
        return stage_records(simulator, stage), stage_costs(simulator, stage)
    graph = simulator.optimized()
    sizes = call_sizes(simulator.program.facts)
    return to_records(graph), graph_costs(graph, simulator.dtype, sizes)


def stage_costs(simulator: Simulator, stage: Stage) -> NodeCosts:
    """Of the stages that are made of `tint` operators, and of what runs. None of the captured one:
    it is the model's own, told by names alone.
    """
    program, sizes = simulator.program, call_sizes(simulator.program.facts)
    if stage == "captured":
        return {}
    if stage == "emitted":
        return emitted_costs(simulator, sizes)
    if stage == "optimized":
        return stage_parts(simulator, stage)[1]
    if stage == "lowered":
        return graph_costs(program.graph, simulator.dtype, sizes)
    with malformed(Path(GRAPH)):  # loading checks the lowered graph alone, which runs
        graph = from_records([vars(record) for record in program.stages[stage]])
        return graph_costs(graph, simulator.dtype, sizes)
