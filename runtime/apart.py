"""A call whose training and last forward pass are programs of their own (`Program.apart`): steps
are a loop, or training is a call of its own length, on which the model's rotation depends.

    updates = program(training segment);  logits = program(whole text, updates)

Updates that a single program would hold as factors are handed over as such.
"""

from __future__ import annotations

from dataclasses import replace

from tintc.ir.facts import ModelFacts
from tintc.ir.outputs import SLOTS, Output
from tintc.runtime.call import Call
from tintc.runtime.steps import Results, frozen_of


def training_of(call: Call, factored: frozenset[str], *, looped: bool) -> Call:
    """The training of a call. factored: slots whose updates are factors, where the caller gets none
    of them. looped: all slots, and what the inner rule keeps, pass from step to step.
    """
    wanted = tuple(kind for kind in SLOTS if kind in call.outputs)
    outputs = SLOTS if looped else wanted or (Output.UPDATES,)
    if not wanted and not looped:
        call = replace(call, factored=factored)
    return replace(call.of_training, outputs=outputs, kept=None)


def last_of(call: Call, training: Call, found: Results, facts: ModelFacts) -> Call | None:
    """What is left of a call when its training has run; None for nothing."""
    rest = tuple(kind for kind in call.outputs if kind not in SLOTS)
    if not rest:
        return None
    updates = found[Output.UPDATES]
    assert isinstance(updates, dict)
    # what no step changes is another one in a call of another length
    frozen = None if facts.by_length else frozen_of(found)
    return replace(call, outputs=rest, given=updates, factored=training.factored, frozen=frozen)
