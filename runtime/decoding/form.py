"""Own weights or factors: how what a context has learned is held.

    weights: W' of every trained slot, (C, O, I)
    factors: keys (C, S, I), values (C, S, O) and rates (C, S) beside the shared W_0

Legend: C contexts, S training tokens of all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.builder import outputs
from tintc.ir.errors import UsageError
from tintc.ir.precision import wide
from tintc.ir.program import Program
from tintc.passes.analysis.factored import FactorNames, factorable, factored
from tintc.passes.analysis.update_forms import Pairs
from tintc.runtime.compiled import Compiled
from tintc.runtime.decoding.program import Updates
from tintc.runtime.first_values import original
from tintc.runtime.specialize.optimize import copy_graph
from tintc.runtime.uncached import uncached

Form = Literal["auto", "factors", "weights"]
FORMS = ("auto", "factors", "weights")


def factored_slots(simulator: Compiled, form: Form, contexts: int, segment: int) -> frozenset[str]:
    """The slots whose updates are returned as factors.

    auto: those where a token of every context then reads fewer numbers: O I + C S (I + O) of the
    shared weight and factors, instead of C O I. Raises UsageError for factors that there are none
    of.
    """
    if form not in FORMS:
        raise UsageError(f"form is {form!r}; expected {', '.join(FORMS)}")
    if form == "weights":
        return frozenset()
    reason = _no_factors(simulator)
    if reason is not None:
        if form == "auto":
            return frozenset()
        raise UsageError(f"form is 'factors', but {reason}; expected auto or weights")
    if form == "auto" and uncached(simulator):  # every token reads the whole text anew
        return frozenset()
    slots = factorable(simulator.program.graph)
    if form == "factors":
        if not slots:
            raise UsageError(
                "form is 'factors', but no update of this rule stays one: it is no sum of products "
                "of tokens; expected auto or weights"
            )
        return frozenset(slots)
    shapes = {slot: simulator.program.layout.prefix[slot].shape for slot in slots}
    return frozenset(
        slot
        for slot, (rows, columns) in shapes.items()
        if rows * columns * (contexts - 1) > contexts * segment * slots[slot] * (rows + columns)
    )


def names_of(program: Program, slots: frozenset[str]) -> dict[str, FactorNames]:
    """Slot -> the names of its factors among updates."""
    graph = copy_graph(program.graph)  # nodes for rates are put into it
    return {slot: found.names for slot, found in factored(graph, slots, Pairs(graph)).items()}


@torch.no_grad()
def as_weights(simulator: Compiled, updates: Updates) -> Updates:
    """The same with own weights: W_0 - sum_s rate_s values_s keys_s^T."""
    if not updates.factored:
        return updates
    names = names_of(simulator.program, updates.factored)
    factors = {name for of_slot in names.values() for name in of_slot}
    values = {name: value for name, value in updates.values.items() if name not in factors}
    for slot, own in names.items():
        values[slot] = _weight(simulator, slot, *(updates.values[name] for name in own))
    order = outputs(simulator.program.graph)["updates"]
    return Updates({slot: values[slot] for slot in order}, frozenset(), updates.positions)


def together(simulator: Compiled, parts: Sequence[Updates]) -> Updates:
    """The contexts of all, one behind the other. Factors of fewer tokens end in zeros."""
    if len({part.factored for part in parts}) > 1:
        parts = [as_weights(simulator, part) for part in parts]
    factors = {n for of in names_of(simulator.program, parts[0].factored).values() for n in of}
    values = {
        name: _below([part.values[name] for part in parts], padded=name in factors)
        for name in parts[0].values
    }
    reached = [part.positions for part in parts if part.positions is not None]
    positions = max(reached) if len(reached) == len(parts) else None
    return Updates(values, parts[0].factored, positions)


def _below(values: list[Tensor], *, padded: bool) -> Tensor:
    if not padded:
        return torch.cat(values)
    most = max(value.shape[1] for value in values)
    behind = [(0, 0) * (value.ndim - 2) + (0, most - value.shape[1]) for value in values]
    return torch.cat([F.pad(v, pad) for v, pad in zip(values, behind, strict=True)])


def _weight(
    simulator: Compiled, slot: str, keys_CSI: Tensor, values_CSO: Tensor, rates_CS: Tensor
) -> Tensor:
    scaled_CSO = wide(values_CSO) * -rates_CS.unsqueeze(-1)
    return torch.baddbmm(wide(original(simulator, slot)), scaled_CSO.mT, wide(keys_CSI))


def _no_factors(simulator: Compiled) -> str | None:
    """Why there are none."""
    if simulator.structure is not None:
        return "the transformer back end has none"
    if simulator.config.looped:
        return f"{simulator.config.steps} steps are a loop, which keeps own weights"
    return None
