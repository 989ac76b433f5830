"""The curve of a streaming report over the position in the text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintc.evaluate.figure import figure
from tintc.evaluate.language import ASCENT, SHUFFLED, UNMODIFIED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#999999")


def plot(report: dict[str, Any], path: Path) -> None:
    """Left: perplexity of every part of the text, before and after. Right: its change, with the
    95 % band by bootstrap over documents. Controls, which may be far off, are left to the table.
    """
    before, *rows = [row for row in report["rows"] if row["learner"] not in (ASCENT, SHUFFLED)]
    with figure(path, columns=2, width=4.6, height=3.6) as (left, right):
        _line(left, before["curve"], "after", "#000000", UNMODIFIED)
        for number, row in enumerate(rows):
            colour = _COLOURS[number % len(_COLOURS)]
            _line(left, row["curve"], "after", colour, row["name"])
            _line(right, row["curve"], "change", colour, row["name"])
            _band(right, row["curve"], colour)
        right.axhline(0, color="#000000", linewidth=0.8)
        for axis in (left, right):
            axis.set_xlabel("position in the text, tokens")
        left.set_ylabel("perplexity")
        right.set_ylabel("change of the perplexity, %")
        left.set_title(f"{report['model']['name']}, {report['data']['name']}", fontsize=9)
        left.legend(fontsize=7, frameon=False)


def _line(axis: Axes, curve: list[dict[str, Any]], name: str, colour: str, label: str) -> None:
    """A point in the middle of each part."""
    axis.plot(
        [_middle(part) for part in curve],
        [part[name] for part in curve],
        color=colour,
        label=label,
        linewidth=1.2,
        marker="o",
        markersize=3,
    )


def _band(axis: Axes, curve: list[dict[str, Any]], colour: str) -> None:
    """Where documents are enough for an interval."""
    low, high = zip(*(part["change_interval"] for part in curve), strict=True)
    axis.fill_between([_middle(p) for p in curve], low, high, color=colour, alpha=0.15, linewidth=0)


def _middle(part: dict[str, Any]) -> float:
    return float(part["first"] + part["last"]) / 2
