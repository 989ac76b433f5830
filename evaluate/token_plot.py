"""The picture of a text: the loss of every token before and after, and the difference. Nothing here
imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tintc.evaluate.figure import figure
from tintc.runtime.showing.tokens import FELL, ROSE, TokenLosses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEFORE = "#666666"
_DOTS = 400  # tokens up to which each has a dot


def draw(losses: TokenLosses, path: Path) -> None:
    """Writes it as PNG, over a file that exists. The trained part is shaded."""
    before = [_known(token.before) for token in losses.tokens]
    after = [_known(token.after) for token in losses.tokens]
    change = [b - a for a, b in zip(before, after, strict=True)]
    with figure(path, rows=2, width=9, height=2.4, sharex=True) as (above, below):
        dot = "." if len(before) <= _DOTS else ""
        for values, name, colour in ((before, "before", _BEFORE), (after, "after", ROSE)):
            above.plot(values, color=colour, label=name, linewidth=0.9, marker=dot, markersize=4)
        above.set_ylabel("loss, nats")
        above.set_title("; ".join(losses.summary()), fontsize=8, loc="left")
        edges = [position - 0.5 for position in range(len(change) + 1)]
        falls, rises = ([side(value, 0) for value in change] for side in (min, max))
        for colour, part in ((FELL, falls), (ROSE, rises)):
            below.stairs(part, edges, fill=True, color=colour)
        below.axhline(0, color=_BEFORE, linewidth=0.8)
        below.set_ylabel("change, nats")
        below.set_xlabel("token")
        below.set_xlim(-0.5, len(change) - 0.5)
        for axis in (above, below):
            _shade(axis, [token.trained for token in losses.tokens])
        above.legend(  # beside the title
            fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1)
        )


def _known(value: float | None) -> float:
    return math.nan if value is None or math.isinf(value) else value


def _shade(axis: Axes, trained: Sequence[bool]) -> None:
    """Behind every run of trained tokens."""
    label, first = "trained on", None
    for position, is_trained in enumerate([*trained, False]):
        if is_trained and first is None:
            first = position
        elif not is_trained and first is not None:
            begin, end = first - 0.5, position - 0.5
            axis.axvspan(begin, end, label=label, color="#e5e5e5", linewidth=0, zorder=0)
            label, first = "", None
