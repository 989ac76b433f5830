"""One way to make every picture: without a display, with the same fonts, written whole or not at
all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def available() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def figure(
    path: Path,
    *,
    columns: int = 1,
    rows: int = 1,
    width: float = 4.5,
    height: float = 3.5,
    **grid: Any,
) -> Iterator[list[Axes]]:
    """Axes in reading order; width and height of each in inches. The PNG is written on leaving."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(columns * width, rows * height), layout="constrained", dpi=160)
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, **grid)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    yield list(axes.flat)
    temporary = path.with_name(f".{path.name}.new")
    made.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)
