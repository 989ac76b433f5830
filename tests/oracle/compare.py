"""Runs a simulator and the reference on the same inputs and compares everything that both
return.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tests.oracle.reference import Reference, reference
from tests.support.models import simulator_of
from tests.support.tolerances import SIMULATOR, error, measured
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator


def assert_equals_reference(
    model: Any,
    config: SimulatorConfig,
    *,
    tolerance: float | None = None,
    min_update: float = 1e-3,
    **inputs: Any,
) -> None:
    """Final logits, initial logits and every sequence's state dict agree at all tokens that are no
    padding.

    min_update: the inner steps must change the logits by this much, else the comparison would say
    little.
    """
    dtype = next(model.parameters()).dtype
    expected = reference(copy.deepcopy(model).double(), config, **inputs)
    limit = SIMULATOR[dtype] if tolerance is None else tolerance
    assert_agrees(
        simulator_of(model, config), expected, limit=limit, min_update=min_update, **inputs
    )


def assert_agrees(
    simulator: Simulator,
    expected: Reference,
    *,
    limit: float,
    min_update: float = 1e-3,
    of: str = "",
    **inputs: Any,
) -> None:
    """The same for a simulator and a reference that are at hand; `of` says in the summary what was
    compared.
    """
    config, dtype = simulator.program.config, simulator.dtype
    with torch.inference_mode():
        alone = simulator(**inputs).logits
        both = simulator(**inputs, return_initial=True)
    real = real_tokens(inputs)
    assert alone.dtype == dtype
    kind = (
        f"{of}{'exact' if config.is_exact else 'approximate'}: logits against autograd, "
        f"{str(dtype).removeprefix('torch.')}"
    )
    for found in (alone, both.logits):
        assert measured(kind, error(found[real], expected.logits[real])) < limit
    assert both.initial_logits is not None
    assert error(both.initial_logits[real], expected.initial_logits[real]) < limit
    assert error(expected.logits[real], expected.initial_logits[real]) > min_update
    for index in range(len(inputs["input_ids"])):
        assert_same_state(
            simulator.updated_state_dict(index=index, **inputs), expected, index, limit
        )


def assert_same_state(
    state: dict[str, Tensor], expected: Reference, index: int, limit: float
) -> None:
    """Every entry of the state dict agrees with the reference's, and there are no others."""
    wanted = expected.states[index]
    assert set(state) == set(wanted)
    wrong = {name: e for name in wanted if not (e := error(state[name], wanted[name])) < limit}
    assert not wrong


def real_tokens(inputs: dict[str, Any]) -> Tensor:
    """(B, T), True on tokens that are no padding."""
    mask = inputs.get("attention_mask")
    return (
        mask.bool()
        if mask is not None and mask.ndim == 2
        else torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    )
