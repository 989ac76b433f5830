"""Where a benchmark runs, and the model that it loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tintc.compiler.driver import examiner
from tintc.compiler.frontend.sources import load_source
from tintc.compiler.gradient_statistics import Statistics
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.named import LOAD
from tintc.ir.precision import dtype_name
from tintc.runtime.machine import device_name

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Placed:
    """options: revision, cache_dir, offline and trust_remote_code of `load_source`. statistics: of
    the optimizer `rms`, as for `tintc.compile`.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    statistics: str | Path | Statistics | None = None

    def where(self) -> dict[str, Any]:
        """What it runs on, as JSON values."""
        return {
            "device": self.device,
            "dtype": dtype_name(self.dtype),
            "device_name": device_name(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def check_counts(self, *names: str) -> None:
        """Raises UsageError for fields that are below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")

    def load(
        self, source: str, config: SimulatorConfig, seed: int, progress: Progress
    ) -> nn.Module:
        """The auxiliary model. Raises SourceError, UnsupportedModelError."""
        progress(LOAD)
        return load_source(
            source,
            dtype=self.dtype,
            seed=seed,
            progress=progress,
            examine=examiner(config),
            **self.options,
        ).model
