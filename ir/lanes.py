"""Where in the program a node stands: a step and a phase."""

from __future__ import annotations

from tintc.ir.node_meta import Phase
from tintc.ir.records import NodeRecord

LAST = "last forward"


def lane(phase: Phase | None, step: int | None, steps: int) -> str:
    """`step 0 backward`; `last forward` behind all steps; nothing for what belongs to no phase.

    phase, step: of a node's record. steps: that the graph holds.
    """
    if phase is None:
        return ""
    return LAST if is_last(phase, step, steps) else f"step {step or 0} {phase}"


def record_lane(record: NodeRecord, steps: int) -> str:
    """The same of a node that was read."""
    return lane(record.info.get("phase"), record.info.get("step"), steps)


def is_last(phase: Phase | None, step: int | None, steps: int) -> bool:
    """Whether this is the forward pass behind all steps."""
    return phase == "forward" and (step or 0) == steps
