"""The exported simulator in onnxruntime, as a benchmark runs it. In a file of its own: who measures
the memory of a loop does not load onnx.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tintc.compiler.onnx import export_onnx
from tintc.compiler.onnx.comparison import opened, rate_of
from tintc.evaluate.speed.workload import Workload
from tintc.runtime.simulator import Simulator

MODEL = "simulator.onnx"


class OnnxRuntime:
    """path: of the exported model. rate: the input inner_lr. It has as many threads as torch."""

    def __init__(self, path: Path, rate: float) -> None:
        self._session = opened(path, threads=torch.get_num_threads())
        kinds = {value.name: value.type for value in self._session.get_inputs()}
        wide = torch.float64 if kinds["inner_lr"] == "tensor(double)" else torch.float32
        self._rate = torch.tensor(rate, dtype=wide).numpy()

    @classmethod
    def of(cls, simulator: Simulator) -> OnnxRuntime:
        """Exports it to a file that is gone when the session has read it."""
        with tempfile.TemporaryDirectory(prefix="tintc-bench-") as folder:
            return cls(write(simulator, Path(folder)), float(rate_of(simulator)))

    def __call__(self, work: Workload) -> list[Tensor]:
        """Logits (T, V) of each sequence."""
        feed = {
            "input_ids": work.ids_BT.numpy(),
            "train_mask": work.train_mask.numpy(),
            "inner_lr": self._rate,
        }
        (logits,) = self._session.run(["logits"], feed)
        return list(torch.from_numpy(logits))


def write(simulator: Simulator, folder: Path) -> Path:
    """The model that is run. Raises UsageError for a type that the export does not have."""
    return export_onnx(simulator, folder / MODEL, check=False).path
