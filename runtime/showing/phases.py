"""A small graph of a simulator for notebooks: how many operators each block has in each phase.

                      forward   backward   descent   last forward
in front                 7
blocks 0 to 3, each     12         10  -->   10  -->   12
behind                   2   -->    3  -->    1  -->    2
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from tintc.ir.lanes import LAST, is_last
from tintc.ir.node_meta import info
from tintc.ir.program import Program

FORWARD, BACKWARD, DESCENT = "forward", "backward", "descent"
PHASES = (FORWARD, BACKWARD, DESCENT, LAST)
_FRONT, _BEHIND = "in front", "behind"


@dataclass(frozen=True)
class Row:
    """Consecutive blocks that have as many operators, or what stands around them. counts: of each
    of PHASES.
    """

    label: str
    counts: tuple[int, ...]

    def said(self) -> str:
        """For those who hear it."""
        pairs = zip(self.counts, PHASES, strict=True)
        return ", ".join(f"{count} {phase}" for count, phase in pairs)


def count_phases(program: Program, steps: int) -> list[Row]:
    """In the order of the forward pass. steps: that the graph holds."""
    places = _places(program)
    found: dict[str, Counter[str]] = {}
    for node in program.graph.nodes:
        record = info(node)
        if node.op == "call_function" and record.phase is not None:
            phase = LAST if is_last(record.phase, record.step, steps) else record.phase
            found.setdefault(places[record.module], Counter())[phase] += 1
    blocks = sorted((place for place in found if place.isdigit()), key=int)
    rows = [
        (place, tuple(found[place][phase] for phase in PHASES))
        for place in (_FRONT, *blocks, _BEHIND)
        if place in found
    ]
    return list(_merged(rows))


def _places(program: Program) -> dict[str, str]:
    """Module path -> number of its block, or on which side of the blocks it stands: in front if it
    computes something before the first of them.
    """
    places: dict[str, str] = {}
    side = _FRONT if program.facts.blocks else _BEHIND
    for node in program.graph.nodes:
        record = info(node)
        if record.phase is None:
            continue
        block, _ = program.facts.place(record.module)
        side = _BEHIND if block else side
        places.setdefault(record.module, block or side)
    return places


def _merged(rows: Iterable[tuple[str, tuple[int, ...]]]) -> Iterable[Row]:
    """Rows of blocks that follow one another and are alike are one."""
    held: list[str] = []
    last: tuple[int, ...] = ()
    for place, counts in [*rows, ("", ())]:
        if held and (not place.isdigit() or not held[0].isdigit() or counts != last):
            yield Row(_label(held), last)
            held = []
        held.append(place)
        last = counts


def _label(places: list[str]) -> str:
    if not places[0].isdigit():
        return places[0]
    if len(places) == 1:
        return f"block {places[0]}"
    return f"blocks {places[0]} to {places[-1]}, each"


# SVG

_LABEL, _CELL, _HEIGHT, _GAP = 120, 84, 20, 12  # pixels
_ARROWS = {FORWARD: " \u2193", BACKWARD: " \u2191", DESCENT: "", LAST: " \u2193"}


def as_svg(rows: list[Row], caption: str) -> str:
    """A cell for what has operators, darker for more, and lines between those that feed each other.
    All of it is in the colour of the text around, so that it can be read on light and dark.
    """
    if not rows:
        return ""
    most = max(count for row in rows for count in row.counts)
    parts = [_text(_x(c), 12, f"{name}{_ARROWS[name]}") for c, name in enumerate(PHASES)]
    for r, row in enumerate(rows):
        parts.append(_text(0, _y(r) + 14, row.label, "start"))
        for c, count in enumerate(row.counts):
            if count:
                parts += [_rect(c, r, 0.06 + 0.26 * count / most), _text(_x(c), _y(r) + 14, count)]
    parts += _lines(rows)
    bottom = _y(len(rows))
    parts.append(_text(0, bottom + 8, caption, "start"))
    said = "; ".join(f"{row.label}: {row.said()}" for row in rows)
    return (
        f'<svg role="img" aria-label="{html.escape(said)}" width="{_LABEL + len(PHASES) * _CELL}" '
        f'height="{bottom + 14}" style="max-width:100%;font:11px sans-serif;color:inherit" '
        f'fill="currentColor" stroke="none">{"".join(parts)}</svg>'
    )


def _x(column: int) -> int:
    """The middle of a cell."""
    return _LABEL + column * _CELL + _CELL // 2


def _y(row: int) -> int:
    """The top of a cell."""
    return 22 + row * (_HEIGHT + _GAP)


def _rect(column: int, row: int, opacity: float) -> str:
    width = _CELL - 2 * _GAP
    return (
        f'<rect x="{_x(column) - width // 2}" y="{_y(row)}" width="{width}" height="{_HEIGHT}" '
        f'rx="3" fill-opacity="{opacity:.2f}"/>'
    )


def _text(x: int, y: int, text: object, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(str(text))}</text>'


def _lines(rows: list[Row]) -> list[str]:
    """Down and up the blocks, and from the gradients of each over its weights to the last pass."""
    half, middle = _CELL // 2 - _GAP, _HEIGHT // 2
    found = []
    for c in (0, 1, 3):
        there = [r for r, row in enumerate(rows) if row.counts[c]]
        found += [
            _line(_x(c), _y(above) + _HEIGHT, _x(c), _y(below))
            for above, below in pairwise(there)
            if below == above + 1
        ]
    for r, row in enumerate(rows):
        across = [(1, 2), (2, 3)] if r < len(rows) - 1 else [(0, 1), (1, 2), (2, 3)]
        found += [
            _line(_x(a) + half, _y(r) + middle, _x(b) - half, _y(r) + middle)
            for a, b in across
            if row.counts[a] and row.counts[b]
        ]
    return found


def _line(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<path d="M{x1} {y1}L{x2} {y2}" stroke="currentColor" stroke-opacity="0.6"/>'
