"""All steps of a call whose graph holds one: a loop over its program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from tintc.ir.config import SimulatorConfig
from tintc.ir.outputs import SLOTS, Output
from tintc.runtime.call import Call
from tintc.runtime.specialize.programs import Result

Results = dict[str, Result]


def all_steps(
    run: Callable[[Call], Results], config: SimulatorConfig, call: Call, *, frozen: bool
) -> Results:
    """Of the first step what the call asks for, and slot values and states after the last. More
    steps than a graph holds are a loop over the program of one; frozen: what no step changes is
    made by the first, and returned too.
    """
    looped = config.looped
    factor = config.schedule_factor(0) if looped else call.lr_factor
    again = tuple(kind for kind in call.outputs if kind in SLOTS)
    steps = config.steps if looped and again else 1
    shared = (Output.FROZEN,) if frozen and steps > 1 else ()
    found = run(replace(call, outputs=(*call.outputs, *shared), lr_factor=factor))
    for number in range(1, steps):
        given, states = found[Output.UPDATES], found[Output.STATES]
        assert isinstance(given, dict) and isinstance(states, dict)
        factor = config.schedule_factor(number)
        step = replace(
            call, outputs=again, given=given, states=states, lr_factor=factor,
            donated=True, frozen=frozen_of(found),
        )  # fmt: skip  # donated: the step before made them
        found |= run(step)
    return found


def frozen_of(found: Results) -> dict[str, Tensor] | None:
    """What no step changes, among the results of the first."""
    values = found.get(Output.FROZEN)
    assert values is None or isinstance(values, dict)
    return values
