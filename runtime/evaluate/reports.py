"""A report as a table that people read: for the terminal, for Markdown, and beside it as JSON and a picture.

A directory of results holds units.jsonl (one line a unit, as they come), report.json, report.md and plot.png.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tintc import __version__
from tintc.compiler.errors import UsageError
from tintc.compiler.json_values import finite
from tintc.runtime.benchmark import device_name
from tintc.runtime.evaluate.language import DYNAMIC, SIMULATOR, UNMODIFIED

UNITS = "units.jsonl"


@dataclass(frozen=True)
class Table:
    """header: of each column. rows: of texts. numeric: from which column on texts are numbers, which stand to the right. notes: below."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    numeric: int = 1

    def markdown(self) -> str:
        """A table as GitHub shows it."""
        lines = ["| " + " | ".join(self.header) + " |"]
        lines.append("|" + "|".join("---" if column < self.numeric else "---:" for column in range(len(self.header))) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"{note}  " for note in self.notes)]).rstrip() + "\n"


def lm_table(report: dict[str, Any]) -> Table:
    """One row a training fraction and learner."""
    data, settings = report["data"], report["settings"]
    rows: list[tuple[str, ...]] = [
        (
            f"{row['fraction']:g}" if row["learner"] == UNMODIFIED else "",
            _learner(row, len(settings["presets"]) > 1),
            _rate(row["inner_lr"]),
            _number(row["perplexity"]),
            "" if row["learner"] == UNMODIFIED else change(row["change"], row["error"]),
            p_value(row["p_value"]),
            "" if row["share"] is None else f"{row['share']:.0%}",
            f"{row['seconds']:.2f}",
        )
        for row in report["rows"]
    ]
    chosen = f"The learning rate {settings['inner_lr']} was given."
    if settings["inner_lr"] is None:
        where = data.get("chosen_on", "the first quarter of the file")
        chosen = f"Learning rates were chosen on {data['choosing_sequences']} sequences of {where}."
    return Table(
        f"{report['model']['name']} on {data['name']}: perplexity of the rest of each sequence",
        ("trained part", "learner", "rate", "perplexity", "change", "p", "of dyn. eval.", "s / seq."),
        rows,
        (
            f"n = {data['sequences']} sequences of {settings['length']} tokens (seeds {', '.join(map(str, settings['seeds']))}); "
            f"{settings['steps']} step{'s' if settings['steps'] > 1 else ''}, {_layers(settings['layers'])}. {chosen}",
            "Change: of the perplexity against the unmodified model, ± standard error over sequences; "
            "p: paired permutation test against the unmodified model.",
        ),
        numeric=2,
    )


def _learner(row: dict[str, Any], presets: bool) -> str:
    if not presets or row["learner"] == UNMODIFIED:
        return str(row["learner"])
    if row["learner"] == DYNAMIC:
        return f"{DYNAMIC} ({'all of' if row['norm_update'] == 'all' else 'shifts of'} norms)"
    exact = row["config"]["attention_gradient"] == "full"
    return str(row["learner"]).replace(SIMULATOR, f"{SIMULATOR} ({'exact' if exact else 'paper'})")


def _layers(layers: int | None) -> str:
    return "all blocks" if layers is None else f"the top {layers} blocks"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:g}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def change(value: float, error: float) -> str:
    """In per cent, with its standard error."""
    return (
        f"{value:+.2f} ± {error:.2f} %"
        if math.isfinite(value) and abs(value) < 1e4
        else "not finite"
        if not math.isfinite(value)
        else "> 100 x"
    )


def p_value(value: float | None) -> str:
    """As tables have it."""
    return "" if value is None else "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


TABLES: dict[str, Callable[[dict[str, Any]], Table]] = {"lm": lm_table}


def about(command: str, seconds: float, device: str) -> dict[str, Any]:
    """What belongs to every report: the command, and on what it ran."""
    versions = {"tintc": __version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}
    machine = {"device": device_name(device), "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}
    return {"command": command, "seconds": round(seconds, 1), "machine": machine}


def prepare_directory(path: Path) -> Path:
    """The directory for results, made if it is missing. Raises UsageError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be a directory for results: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path} cannot be written to; choose another --output")
    return path


def write(path: Path, report: dict[str, Any]) -> None:
    """report.json, report.md and, where matplotlib is installed, plot.png; each replaces its file when it is whole."""
    from tintc.runtime.evaluate import plots

    table = TABLES[report["experiment"]](report)
    _replace(path / "report.json", json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
    _replace(path / "report.md", table.markdown() + f"\n`{report['command']}`\n")
    plots.draw(report, path / "plot.png")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
