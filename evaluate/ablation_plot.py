"""The picture of an ablation: what each approximation does to the update, and what that costs in
task performance.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintc.evaluate.figure import available, figure
from tintc.ir.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

_COLOURS = "viridis"
_BAR = "#0072B2"
_REFERENCE = "#D55E00"
_ROW = 0.24  # inches
_MOST_TICKS = 12


def plot(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG with a line for each variant: a bar, its gain in perplexity with the standard
    error, and cells, the cosine of its update with the exact gradient in each block. Raises
    UsageError without matplotlib."""
    if not available():
        raise UsageError(
            "a plot needs matplotlib, which is not installed; expected `pip install 'tintc[plot]'`"
        )
    rows = report["rows"]
    errors = bool(rows[0]["layers"])
    with figure(
        path, columns=2 if errors else 1, width=4.8, height=1.5 + _ROW * len(rows), sharey=True
    ) as axes:
        _bars(axes[0], rows)
        if errors:
            _add_scale(axes[1], _cells(axes[1], rows))
        axes[0].figure.suptitle(_title(report), fontsize=9)


def _title(report: dict[str, Any]) -> str:
    data, settings = report["data"], report["settings"]
    steps = f"{settings['steps']} step{'s' if settings['steps'] > 1 else ''}"
    blocks = "all blocks" if settings["layers"] is None else f"the top {settings['layers']} blocks"
    about = (
        f"n = {data['sequences']} sequences of {settings['tokens']} tokens, the first "
        f"{settings['trained']} trained on, {steps}, {blocks}"
    )
    return f"What each approximation costs: {report['model']['name']}, {data['name']}\n{about}"


def _bars(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Gains downwards; a change that is not finite has no bar, and one far off the others is
    cut.
    """
    gains = [-row["change"] if math.isfinite(row["change"] or 0) else math.nan for row in rows]
    axis.barh(
        range(len(rows)),
        gains,
        color=[_REFERENCE if index == 0 else _BAR for index in range(len(rows))],
        height=0.7,
    )
    bars = [row["error"] if math.isfinite(row["error"]) else 0.0 for row in rows]
    axis.errorbar(
        gains, range(len(rows)), xerr=bars, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2
    )
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(gains[0], color=_REFERENCE, linewidth=0.8, linestyle=":")
    axis.set_xlabel("gain in perplexity, % (± standard error)", fontsize=8)
    axis.set_title("task performance", fontsize=9)
    tops = [gain + bar for gain, bar in zip(gains, bars, strict=True) if math.isfinite(gain)]
    lows = [gain - bar for gain, bar in zip(gains, bars, strict=True) if math.isfinite(gain)]
    high, low = max(tops, default=1.0), min(lows, default=0.0)
    axis.set_xlim(max(min(0.0, low), -max(high, 1e-3)) * 1.08, max(high, 1e-3) * 1.08)


def _cells(axis: Axes, rows: list[dict[str, Any]]) -> ScalarMappable:
    """Cosines of all blocks, and behind them the number of all parameters together."""
    names = list(rows[0]["layers"])
    cosines = [[row["layers"][name]["cosine"] for name in names] for row in rows]
    image = axis.imshow(
        cosines, aspect="auto", cmap=_COLOURS, vmin=0, vmax=1, interpolation="nearest"
    )
    axis.hlines(
        [index + 0.5 for index in range(len(rows) - 1)],
        -0.5,
        len(names) - 0.5,
        color="white",
        linewidth=0.8,
    )
    step = math.ceil(len(names) / _MOST_TICKS)
    ticks = [index for index, name in enumerate(names) if name.isdigit() and int(name) % step == 0]
    ticks += [index for index, name in enumerate(names) if not name.isdigit()]
    axis.set_xticks(ticks, [names[index] if names[index].isdigit() else "norm" for index in ticks])
    axis.tick_params(axis="y", left=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("block, and the final norm", fontsize=8)
    axis.set_title("update: cosine with the exact gradient", fontsize=9)
    for index, row in enumerate(rows):
        text = (
            "-"
            if row["cosine"] is None or not math.isfinite(row["cosine"])
            else _short(row["cosine"])
        )
        axis.annotate(
            text, (1.01, index), xycoords=("axes fraction", "data"), fontsize=7, va="center"
        )
    axis.annotate(
        "all", (1.01, 1.005), xycoords="axes fraction", fontsize=7, va="bottom", fontweight="bold"
    )
    return image


def _short(cosine: float) -> str:
    """Enough digits to tell what is nearly 1 from 1."""
    return f"{cosine:.3f}" if cosine < 0.999 else f"{cosine:.6f}"


def _add_scale(axis: Axes, image: ScalarMappable) -> None:
    bar = axis.figure.colorbar(image, ax=axis, fraction=0.05, pad=0.14, aspect=30)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
