"""Where in the program a node stands: a step and a phase."""

from __future__ import annotations

from typing import Any

LAST = "last forward"


def lane(info: dict[str, Any], steps: int) -> str:
    """`step 0 backward`; `last forward` behind all steps; nothing for what belongs to no phase.

    info: of a record. steps: that the graph holds.
    """
    phase = info.get("phase")
    if phase is None:
        return ""
    step = info.get("step") or 0
    return LAST if step == steps and phase == "forward" else f"step {step} {phase}"
