"""What a run leaves behind.

A directory of results holds units.jsonl (one line a unit, as they come), report.json, report.md and
plot.png.
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tintc.evaluate.tables import TABLES
from tintc.ir.errors import UsageError
from tintc.ir.json_values import finite
from tintc.runtime.machine import device_name
from tintc.version import __version__

UNITS = "units.jsonl"


def about(command: str, seconds: float, device: str) -> dict[str, Any]:
    """What belongs to every report: the command, and on what it ran."""
    versions = {
        "tintc": __version__,
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }
    machine = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }
    return {"command": command, "seconds": round(seconds, 1), "machine": machine}


def prepare_directory(path: Path) -> Path:
    """The directory for results, made if it is missing. Raises UsageError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be a directory for results: {error.strerror or error}"
        ) from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path} cannot be written to; choose another directory")
    return path


def write(path: Path, report: dict[str, Any]) -> None:
    """report.json, report.md and, where matplotlib is installed, plot.png; each replaces its file
    when it is whole.
    """
    from tintc.evaluate import plots

    table = TABLES[report["experiment"]](report)
    _replace(path / "report.json", json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
    _replace(path / "report.md", table.markdown() + f"\n`{report['command']}`\n")
    plots.draw(report, path / "plot.png")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
