"""tintc: a graph compiler from language models to Trainable-Transformer-in-Transformer simulators.

    import tintc
    simulator = tintc.compile("tiny-opt", tintc.SimulatorConfig.paper(inner_lr=1e-4))
    out = simulator(input_ids, train_mask)

torch and transformers are imported when they are first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import (
    ArtifactError,
    InputError,
    MemoryLimitError,
    NumericalError,
    SourceError,
    TintcError,
    UnsupportedModelError,
    UsageError,
)
from tintc.version import __version__

if TYPE_CHECKING:
    from tintc.compiler.adapted_files import load_adapted
    from tintc.compiler.adapted_writer import SavedAdapted, save_adapted
    from tintc.compiler.artifact import load
    from tintc.compiler.artifact_writer import save
    from tintc.compiler.driver import compile
    from tintc.compiler.gathering import gather_statistics
    from tintc.compiler.gradient_statistics import Statistics
    from tintc.compiler.onnx import export_onnx, export_onnx_pair
    from tintc.compiler.reports.parameters import parameter_report
    from tintc.page.notebook import Page, show
    from tintc.passes.specializing import OPTIMIZATION_NAMES
    from tintc.runtime.adapted import Adapted, AdaptedOutput, stack
    from tintc.runtime.outputs import SimulatorLosses, SimulatorOutput
    from tintc.runtime.simulator import Simulator

__all__ = [
    "OPTIMIZATION_NAMES",
    "Adapted",
    "AdaptedOutput",
    "ArtifactError",
    "InputError",
    "MemoryLimitError",
    "NumericalError",
    "Page",
    "SavedAdapted",
    "Simulator",
    "SimulatorConfig",
    "SimulatorLosses",
    "SimulatorOutput",
    "SourceError",
    "Statistics",
    "TintcError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "compile",
    "export_onnx",
    "export_onnx_pair",
    "gather_statistics",
    "load",
    "load_adapted",
    "parameter_report",
    "save",
    "save_adapted",
    "show",
    "stack",
]

_LAZY = {
    "compile": "tintc.compiler.driver",
    "export_onnx": "tintc.compiler.onnx",
    "export_onnx_pair": "tintc.compiler.onnx",
    "gather_statistics": "tintc.compiler.gathering",
    "Statistics": "tintc.compiler.gradient_statistics",
    "load": "tintc.compiler.artifact",
    "load_adapted": "tintc.compiler.adapted_files",
    "save_adapted": "tintc.compiler.adapted_writer",
    "SavedAdapted": "tintc.compiler.adapted_writer",
    "parameter_report": "tintc.compiler.reports.parameters",
    "save": "tintc.compiler.artifact_writer",
    "Page": "tintc.page.notebook",
    "show": "tintc.page.notebook",
    "Adapted": "tintc.runtime.adapted",
    "AdaptedOutput": "tintc.runtime.adapted",
    "stack": "tintc.runtime.adapted",
    "Simulator": "tintc.runtime.simulator",
    "SimulatorLosses": "tintc.runtime.outputs",
    "SimulatorOutput": "tintc.runtime.outputs",
    "OPTIMIZATION_NAMES": "tintc.passes.specializing",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tintc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
