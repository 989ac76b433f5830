"""Which rows of a call read the weights of which context.

Legend: R rows, C contexts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tintc.ir.choices import Contexts
from tintc.ir.errors import InputError


@dataclass(frozen=True)
class Part:
    """Rows that run together. rows: their numbers, None for all. first, count: their contexts,
    which stand side by side.
    """

    rows: tuple[int, ...] | None
    first: int
    count: int
    contexts: Contexts


def contexts_of_rows(index: Sequence[int], rows: int) -> list[int]:
    """The context of each of R rows.

    index: the context of each sequence; n rows in turn read that of one: prompts of one context,
    beams, several continuations. Raises InputError if R is no multiple of the sequences.
    """
    each, rest = divmod(rows, len(index))
    if rest or not each:
        raise InputError(
            f"there are {rows} prompts for {len(index)} adapted sequences; expected one for each, "
            "or the same number for each, side by side; select(rows) says which reads which"
        )
    return [context for context in index for _ in range(each)]


def parts(index: Sequence[int], rows: int, *, factored: bool) -> list[Part]:
    """How R rows run: together where each context has as many rows as the others, side by side;
    else context by context. No weight is copied.

    index, rows: as of `contexts_of_rows`.
    """
    of_row = contexts_of_rows(index, rows)
    counts = Counter(of_row)
    distinct = list(counts)
    in_order = of_row == [context for context in distinct for _ in range(counts[context])]
    contiguous = distinct == list(range(distinct[0], distinct[0] + len(distinct)))
    if in_order and contiguous and len(set(counts.values())) == 1:
        n, count = counts[distinct[0]], len(distinct)
        return [Part(None, distinct[0], count, _contexts(count, n, factored))]
    return [
        Part(
            tuple(row for row, of in enumerate(of_row) if of == context),
            context,
            1,
            _contexts(1, counts[context], factored),
        )
        for context in distinct
    ]


def _contexts(count: int, rows_of_each: int, factored: bool) -> Contexts:
    """Factors always have a dimension of contexts."""
    if count == 1 and not factored:
        return Contexts.ONE
    return Contexts.EACH if rows_of_each == 1 else Contexts.GROUPS
