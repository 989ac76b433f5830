"""Tables as they are printed: a row is one line where the terminal is wide enough, else several.

    model     auxiliary  K    D_sim          model     auxiliary  K
    tiny-opt  1.98 M     80   400       ->       D_sim
                                             tiny-opt  1.98 M     80
                                                 400

What is printed to no terminal is as wide as COLUMNS says, or 80.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.text import Text

_GAP = 2  # columns between cells
_INDENT = 4  # of what continues a row
_WRAPPED = 30  # columns that a long text must have to stand beside others

Group = list[tuple[int, int]]  # columns of a line, and how wide each may be


class Sheet:
    """header: of each column, or none. numeric: from which column on texts are numbers, which stand
    to the right. bold: the first column.
    """

    def __init__(self, *header: str, numeric: int | None = None, bold: bool = False) -> None:
        self.header, self.bold = header, bold
        self._numeric = numeric
        self.rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def lines(self, width: int) -> Iterator[Text]:
        """Every line, none wider than `width` but for a single word."""
        table = [self.header, *self.rows] if self.header else self.rows
        if not table:
            return
        columns = list(zip(*table, strict=True))
        words = [max(map(_longest_word, column)) for column in columns]
        groups = _groups([max(map(cell_len, column)) for column in columns], words, width)
        for number, row in enumerate(table):
            for depth, group in enumerate(groups):
                if depth and not any(row[column] for column, _ in group):
                    continue
                for text in self._group(row, group, _INDENT if depth else 0):
                    if self.header and number == 0:
                        text.stylize("bold")
                    elif self.bold and not depth and text.plain[:1].strip():
                        text.stylize("bold", 0, len(row[0]))
                    yield text

    def _group(self, row: Sequence[str], group: Group, indent: int) -> Iterator[Text]:
        """Cells side by side, the last of them wrapped if it must be."""
        *before, (last, room) = group
        start = " " * indent
        for column, width in before:
            start += self._aligned(row[column], column, width) + " " * _GAP
        text = self._aligned(row[last], last, room) if self._is_numeric(last) else row[last]
        first, *rest = [text] if cell_len(text) <= room else _wrapped(text, room)
        yield Text((start + first).rstrip())
        for line in rest:
            yield Text(" " * len(start) + line)

    def _is_numeric(self, column: int) -> bool:
        return self._numeric is not None and column >= self._numeric

    def _aligned(self, text: str, column: int, width: int) -> str:
        pad = " " * (width - cell_len(text))
        return pad + text if self._is_numeric(column) else text + pad


def _groups(widths: Sequence[int], words: Sequence[int], width: int) -> list[Group]:
    """Which columns share a line. Only the last of a line may be narrower than its texts, and where
    it can, no narrower than the longest of its words.
    """
    groups: list[Group] = [[]]
    room = width
    for column, wanted in enumerate(widths):
        wraps = wanted > width // 2 and room >= max(_WRAPPED, words[column])
        if groups[-1] and not (wanted <= room or wraps):
            groups.append([])
            room = width - _INDENT
        groups[-1].append((column, max(min(wanted, room), 1)))
        room = room - wanted - _GAP
    return groups


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
