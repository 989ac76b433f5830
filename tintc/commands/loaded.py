"""The simulator that `tintc run` reads."""

from __future__ import annotations

from pathlib import Path

import torch

from tintc.compiler.artifact import load
from tintc.runtime.simulator import Simulator


def load_at_rate(
    path: Path, inner_lr: float | None, device: str | None, dtype: torch.dtype | None
) -> Simulator:
    """At another inner learning rate than the compiled one, if one is given."""
    simulator = load(path, device=device, dtype=dtype)
    if inner_lr is not None:
        simulator.inner_lr.data.fill_(inner_lr)
    return simulator
