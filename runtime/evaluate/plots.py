"""Pictures of reports. matplotlib is an extra: without it there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintc.runtime.evaluate.language import ASCENT, DYNAMIC, SHUFFLED, SIMULATOR, UNMODIFIED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {UNMODIFIED: "#000000", DYNAMIC: "#0072B2", SIMULATOR: "#D55E00", SHUFFLED: "#999999", ASCENT: "#CC79A7"}
MARKERS = {DYNAMIC: "s", SIMULATOR: "o", SHUFFLED: "x", ASCENT: "v"}


def available() -> bool:
    """Whether pictures can be drawn."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def draw(report: dict[str, Any], path: Path) -> bool:
    """Writes the report's picture as PNG; False without matplotlib."""
    if not available():
        return False
    return PLOTS[report["experiment"]](report, path)


def lm_plot(report: dict[str, Any], path: Path) -> bool:
    """Change of the perplexity against the trained part, with standard errors; one panel a preset."""
    from tintc.runtime.evaluate.figure import figure

    presets = report["settings"]["presets"]
    with figure(path, columns=len(presets), width=4.6, height=3.6) as axes:
        for axis, preset in zip(axes, presets, strict=True):
            _lm_panel(axis, [row for row in report["rows"] if _of_preset(row, preset)])
            axis.set_title(f"{report['model']['name']}, {report['data']['name']}" + (f", {preset}" if len(presets) > 1 else ""), fontsize=9)
        axes[0].set_ylabel("change of the perplexity, %")
        axes[0].legend(fontsize=7, frameon=False)
    return True


def _of_preset(row: dict[str, Any], preset: str) -> bool:
    if row["learner"] == DYNAMIC:
        return bool(row["norm_update"] == ("all" if preset == "exact" else "bias"))
    return row["config"] is not None and bool((row["config"]["attention_gradient"] == "full") == (preset == "exact"))


def _lm_panel(axis: Axes, rows: list[dict[str, Any]]) -> None:
    learners = list(dict.fromkeys(row["learner"] for row in rows))
    for learner in learners:
        found = [row for row in rows if row["learner"] == learner]
        axis.errorbar(
            [row["fraction"] for row in found],
            [row["change"] for row in found],
            yerr=[row["error"] for row in found],
            color=COLOURS[learner],
            marker=MARKERS[learner],
            label=learner,
            linewidth=1.2,
            markersize=4,
            capsize=2,
        )
    axis.axhline(0, color=COLOURS[UNMODIFIED], linewidth=0.8)
    axis.set_xlabel("part of the sequence that is trained on")
    largest = max((abs(row["change"]) for row in rows if row["learner"] in (DYNAMIC, SIMULATOR)), default=1.0)
    axis.set_ylim(-1.6 * largest, 1.6 * largest)  # a control may be off the scale: that it is bad is what it is there to show


PLOTS: dict[str, Callable[[dict[str, Any], Path], bool]] = {"lm": lm_plot}
