"""Pictures of reports. matplotlib is an extra: without it there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintc.evaluate import ablation_plot, stream_plot
from tintc.evaluate.figure import available, figure
from tintc.evaluate.language import ASCENT, DYNAMIC, SHUFFLED, SIMULATOR, UNMODIFIED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
IN_CONTEXT = "in context"
COLOURS = {
    UNMODIFIED: "#000000",
    IN_CONTEXT: "#009E73",
    DYNAMIC: "#0072B2",
    SIMULATOR: "#D55E00",
    SHUFFLED: "#999999",
    ASCENT: "#CC79A7",
}
MARKERS = {IN_CONTEXT: "D", DYNAMIC: "s", SIMULATOR: "o", SHUFFLED: "x", ASCENT: "v"}


def draw(report: dict[str, Any], path: Path) -> bool:
    """Writes the report's picture as PNG; False without matplotlib."""
    if not available():
        return False
    PLOTS[report["experiment"]](report, path)
    return True


def lm_plot(report: dict[str, Any], path: Path) -> None:
    """Change of the perplexity against the trained part, with standard errors; one panel a
    preset.
    """
    presets = report["settings"]["presets"]
    with figure(path, columns=len(presets), width=4.6, height=3.6) as axes:
        for axis, preset in zip(axes, presets, strict=True):
            _lm_panel(axis, [row for row in report["rows"] if _of_preset(row, preset)])
            axis.set_title(
                f"{report['model']['name']}, {report['data']['name']}"
                + (f", {preset}" if len(presets) > 1 else ""),
                fontsize=9,
            )
        axes[0].set_ylabel("change of the perplexity, %")
        axes[0].legend(fontsize=7, frameon=False)


def _of_preset(row: dict[str, Any], preset: str) -> bool:
    if row["learner"] == DYNAMIC:
        return bool(row["norm_update"] == ("all" if preset == "exact" else "bias"))
    return row["config"] is not None and bool(
        (row["config"]["attention_gradient"] == "full") == (preset == "exact")
    )


def _lm_panel(axis: Axes, rows: list[dict[str, Any]]) -> None:
    learners = list(dict.fromkeys(row["learner"] for row in rows))
    limit = 1.6 * max(
        (abs(row["change"]) for row in rows if row["learner"] in (DYNAMIC, SIMULATOR)), default=1.0
    )
    for learner in learners:
        found = [row for row in rows if row["learner"] == learner]
        shown = any(abs(row["change"]) <= limit for row in found)
        axis.errorbar(
            [row["fraction"] for row in found],
            [row["change"] for row in found],
            yerr=[row["error"] for row in found],
            color=COLOURS[learner],
            marker=MARKERS[learner],
            label=learner if shown else f"{learner} (off the scale)",
            linewidth=1.2,
            markersize=4,
            capsize=2,
        )
    axis.axhline(0, color=COLOURS[UNMODIFIED], linewidth=0.8)
    axis.set_xlabel("part of the sequence that is trained on")
    axis.set_ylim(
        -limit, limit
    )  # a control may be off the scale: that it is bad is what it is there to show


def classify_plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy of every task and of their average, with standard errors over demonstrations; one
    panel a number of demonstrations.
    """
    shots = report["settings"]["shots"]
    with figure(path, rows=len(shots), width=7.5, height=2.8, sharex=True) as axes:
        for axis, count in zip(axes, shots, strict=True):
            results = [result for result in report["results"] if result["shots"] == count]
            _classify_panel(
                axis, results, [row for row in report["averages"] if row["shots"] == count]
            )
            axis.set_title(
                f"{report['model']['name']}, "
                f"{'zero-shot' if count == 0 else f'{count} demonstrations'}",
                fontsize=9,
            )
            axis.set_ylabel("accuracy, %")
            axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _classify_panel(
    axis: Axes, results: list[dict[str, Any]], averages: list[dict[str, Any]]
) -> None:
    names = [row["name"] for row in averages]
    for index, name in enumerate(names):
        rows = [
            *(result["rows"][index] for result in results),
            {**averages[index], "standard_error": None},
        ]
        kind = _kind(name)
        axis.errorbar(
            [place + 0.12 * (index - len(names) / 2) for place in range(len(rows))],
            [100 * row["accuracy"] for row in rows],
            yerr=[100 * (row["standard_error"] or 0) for row in rows],
            color=COLOURS[kind],
            marker=MARKERS.get(kind, "_"),
            linestyle="none",
            markersize=5,
            capsize=2,
            label=name,
        )
    axis.axvline(len(results) - 0.55, color=COLOURS[SHUFFLED], linewidth=0.8, linestyle=":")
    axis.set_xticks(
        range(len(results) + 1),
        [*(result["title"].replace(" ", "\n") for result in results), "average"],
    )
    axis.tick_params(axis="x", labelbottom=True)


def _kind(name: str) -> str:
    """Which of the learners that have a colour a row is about."""
    if name.endswith(IN_CONTEXT):
        return IN_CONTEXT
    if not name.startswith("simulator"):
        return DYNAMIC if name == DYNAMIC else UNMODIFIED
    return ASCENT if "ascent" in name else SHUFFLED if "shuffled" in name else SIMULATOR


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "lm": lm_plot,
    "classify": classify_plot,
    "ablate": ablation_plot.plot,
    "stream": stream_plot.plot,
}
