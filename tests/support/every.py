"""Every model that the tests of families run, by name; captured and lowered once a process."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from tests.support.decoders import DECODERS
from tests.support.families import FAMILIES, Builder
from tests.support.once import capture_once, lower_once
from tests.support.variants import ROUNDED_ALIBI, VARIANTS
from tintc.compiler.casts import no_casts
from tintc.compiler.frontend.capture import Captured
from tintc.ir.config import SimulatorConfig
from tintc.ir.program import Program
from tintc.runtime.simulator import Simulator

BUILDERS: dict[str, Builder] = {
    **{name: family.build for name, family in FAMILIES.items()},
    **VARIANTS,
    **DECODERS,
}


@cache
def model_of(name: str) -> nn.Module:
    """Do not change it. Whoever asks first, under inference_mode or not, it is the same."""
    with torch.inference_mode(False):
        return {**BUILDERS, **ROUNDED_ALIBI}[name]()


@cache
def captured(name: str, wide: bool) -> Captured:
    """wide: without the casts of the model's code. Copy it before passes rewrite its graph."""
    with torch.inference_mode(False), no_casts(wide):
        return capture_once(model_of(name))


@cache
def lowered(name: str, wide: bool, config: SimulatorConfig) -> Program:
    with torch.inference_mode(False):
        return lower_once(captured(name, wide).copy(), config)


@cache
def simulator_of(
    name: str,
    wide: bool,
    config: SimulatorConfig,
    backend: str = "fused",
    share: str = "none",
) -> Simulator:
    """Do not change it."""
    program, tensors = lowered(name, wide, config), captured(name, wide).tensors
    with torch.inference_mode(False):  # whoever asks first, its rate may be differentiated
        return Simulator(program, tensors, backend=backend, share=share)
