"""What the inner rule keeps beside the weights, and which weights it does not limit."""

from __future__ import annotations

import math

from tintc.compiler.report_types import State
from tintc.ir.builder import outputs
from tintc.ir.node_meta import info
from tintc.ir.program import Program
from tintc.runtime.simulator import Simulator


def states(program: Program) -> dict[str, State]:
    """By kind: momentum, first and second moments, count. Numbers are those of one sequence."""
    found: dict[str, State] = {}
    for slot, node in outputs(program.graph).get("states", {}).items():
        kind = found.setdefault(slot.rpartition("/")[2], {"slots": 0, "numbers": 0})
        kind["slots"] += 1
        kind["numbers"] += math.prod(size for size in info(node).shape if isinstance(size, int))
    return found


def unlimited(simulator: Simulator) -> list[str]:
    """Trained weights that are 0 as they were given: `max_drift` is a share of their norm, and
    leaves them alone.
    """
    if simulator.config.max_drift is None or simulator.device.type == "meta":
        return []
    slots = simulator.program.layout.prefix.values()
    learning = dict.fromkeys(slot.parameter for slot in slots if slot.updated)
    weights = simulator.prefix.tensors()
    return [name for name in learning if not bool(weights[name].any())]
