"""The graph of a simulator at every stage, as records: what `tintc inspect` and the page show."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from tintc.compiler.artifact import load
from tintc.compiler.artifact_reader import read_graph
from tintc.ir.named import Stage
from tintc.ir.records import NodeRecord, to_records
from tintc.runtime.simulator import Simulator

STAGES: tuple[Stage, ...] = get_args(Stage)


def stages_of(simulator: Simulator) -> tuple[Stage, ...]:
    """Those that a simulator has: the transformer back end runs the lowered graph as it is."""
    made = ["emitted"] if simulator.structure is not None else ["optimized", "emitted"]
    known = {*simulator.program.stages, *made}
    return tuple(stage for stage in STAGES if stage in known)


def stage_records(simulator: Simulator, stage: Stage) -> list[NodeRecord]:
    """The graph after a stage; optimized and emitted are those of the usual call that nobody
    differentiates. Raises UsageError for a stage that the back end does not have.
    """
    if stage == "emitted":
        return to_records(simulator.emitted(differentiable=False).graph)
    if stage == "optimized":
        return to_records(simulator.optimized())
    return simulator.program.stages[stage]


def records_of(path: Path, stage: Stage) -> list[NodeRecord]:
    """The same of an artifact; its weights are read only where the stage depends on them."""
    if stage in ("optimized", "emitted"):
        return stage_records(load(path), stage)
    return read_graph(path).records()[stage]
