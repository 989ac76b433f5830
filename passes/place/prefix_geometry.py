"""Solves for K, D_sim and H_sim: the shape of all prefix tokens, and how matrices are cut into
tiles.

With d = D_sim / H_sim coordinates a head, a tile of S rows a token and P heads a row fits if S * P
+ 1 <= H_sim (one head holds the biases) and K <= d (a one-hot of the K prefix tokens is the value
of a head). Solved are the sizes with the fewest parameters, counted exactly up to gates and
vectors, which no choice changes much:

    pages * K * D_sim  +  sum over modules of S P d (S + P + 2)  +  2 d (K + 1)

Searched are K = d (or the longest matrix's rows, if fewer), up to 24 heads a row and the numbers of
heads in _ROW_HEADS, and counted is a simulator that shares nothing. The second term is the four
maps of one linear attention over a tile (runtime/backends/transformer/modules/linear.py), once for
every forward, backward and descent operator that reads the matrix; the third is the position code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError

# Heads a page may have, less the one for biases, when they are solved for.
_ROW_HEADS = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    12,
    14,
    15,
    16,
    18,
    20,
    24,
    25,
    28,
    30,
    32,
    36,
    42,
    48,
    49,
    56,
    64,
)
_MOST_PIECES = 24


class Geometry(NamedTuple):
    """tokens: K. heads: H_sim. width: d, coordinates a head."""

    tokens: int
    heads: int
    width: int


class Matrix(NamedTuple):
    """A weight: its shape, how many operators read it, whether it has a bias, and how many values
    of its shape have pages: its own, and what the inner rule keeps beside it.
    """

    rows: int
    columns: int
    uses: int
    bias: bool
    values: int = 1


@dataclass
class Weights:
    """matrices, and the sizes of vectors (gains, shifts) that lie in single tokens."""

    matrices: list[Matrix]
    vectors: list[int]


def attention_numbers(groups: int, pieces: int, width: int) -> int:
    """Parameters of one linear attention over a tile: maps P -> SP, 1 -> SP, SP -> S (or their
    mirror images), and one that moves nothing."""
    heads = groups * pieces
    return heads * width * (groups + pieces + 2)


@lru_cache(maxsize=1 << 16)
def tiling(rows: int, columns: int, geometry: Geometry) -> tuple[int, int]:
    """(S, P): most rows a token and heads a row of a matrix's tiles, with the fewest pages, then
    the smallest maps.
    """
    k, heads, width = geometry
    best: tuple[int, int, int, int] | None = None
    for pieces in range(1, min(math.ceil(columns / width), heads - 1) + 1):
        groups = min((heads - 1) // pieces, math.ceil(rows / k), width)
        pages = math.ceil(rows / (groups * k)) * math.ceil(columns / (pieces * width))
        found = (pages, pages * attention_numbers(groups, pieces, width), groups, pieces)
        best = min(best or found, found)
    assert best is not None
    return best[2:]


def solve(weights: Weights, config: SimulatorConfig) -> Geometry:
    """The geometry with the fewest parameters among those that the config allows. Raises UsageError
    if there is none.
    """
    _check(weights, config)
    shapes = Counter(weights.matrices)
    candidates = {
        g
        for g in _candidates(weights, config)
        if g.heads * g.width >= max(weights.vectors, default=1)
    }
    return min(candidates, key=lambda g: (_numbers(shapes, weights.vectors, g), g))


def _numbers(shapes: Counter[Matrix], vectors: list[int], geometry: Geometry) -> int:
    k, heads, width = geometry
    pages = math.ceil(sum(vectors) / (k * heads * width))
    maps = 2 * width * (k + 1)
    for (rows, columns, uses, bias, values), count in shapes.items():
        groups, pieces = tiling(rows, columns, geometry)
        down, across = math.ceil(rows / (groups * k)), math.ceil(columns / (pieces * width))
        biases = down * groups * width * 4 if bias else 0
        pages += count * down * across * values
        maps += count * uses * (down * across * attention_numbers(groups, pieces, width) + biases)
    return pages * k * heads * width + maps


def _candidates(weights: Weights, config: SimulatorConfig) -> list[Geometry]:
    k, hidden, heads = config.prefix_tokens, config.sim_hidden, config.sim_heads
    longest = max((m.rows for m in weights.matrices), default=1)
    if hidden is not None:
        shapes = [(h, hidden // h) for h in ([heads] if heads else _divisors(hidden)[1:])]
    else:
        columns = {m.columns for m in weights.matrices} | set(weights.vectors)
        widths = {
            math.ceil(c / pieces) for c in columns for pieces in range(1, _MOST_PIECES + 1)
        } | ({k} if k else set())
        least = max(weights.vectors, default=1)
        counts = [heads] if heads else [h + 1 for h in _ROW_HEADS]
        shapes = [(h, d) for h in counts for d in widths | {math.ceil(least / h)}]
    return [Geometry(k or min(d, longest), h, d) for h, d in shapes if (k or 1) <= d]


def _check(weights: Weights, config: SimulatorConfig) -> None:
    """Raises UsageError, naming the nearest size that works, if no geometry has the sizes that the
    config sets.
    """
    sizes = {name: getattr(config, name) for name in ("prefix_tokens", "sim_hidden", "sim_heads")}
    widest = max(weights.vectors, default=1)
    problem = _problem(sizes, widest)
    if problem is None:
        return
    field, why = problem
    for name in dict.fromkeys(
        (field, "sim_hidden", "sim_heads")
    ):  # another one where no value of this one would do
        nearest = _nearest(sizes, name, widest)
        if nearest is not None:
            other = "" if name == field else f"{name} "
            raise UsageError(
                f"{field} is {sizes[field]}; {why}. The nearest that works is {other}{nearest}"
            )
    alone = _nearest({**dict.fromkeys(sizes), field: sizes[field]}, field, widest)
    raise UsageError(
        f"{field} is {sizes[field]}; {why}. Leave the other sizes to tintc: then the nearest that "
        f"works is {alone}"
    )


def _problem(sizes: dict[str, int | None], widest: int) -> tuple[str, str] | None:
    """(size that is wrong, what was expected and why); None if some geometry has these sizes."""
    k, hidden, heads = sizes["prefix_tokens"], sizes["sim_hidden"], sizes["sim_heads"]
    if heads is not None and heads < 2:
        return "sim_heads", "expected at least 2: one head of a prefix token holds biases"
    if hidden is None:
        return None
    least = max(widest, 2)
    if hidden < least:
        return (
            "sim_hidden",
            f"expected at least {least}: a prefix token holds a norm's gain or shift of {widest} "
            "numbers",
        )
    if heads is not None and hidden % heads:
        return (
            "sim_heads",
            f"expected a divisor of sim_hidden, {hidden}: each head holds an equal piece",
        )
    widest_head = hidden // (heads or _divisors(hidden)[1])
    if k is not None and k > widest_head:
        why = (
            "the coordinates of a head (sim_hidden / sim_heads): a head holds a one-hot of the "
            "prefix tokens"
        )
        return "prefix_tokens", f"expected at most {widest_head}, {why}"
    return None


def _nearest(sizes: dict[str, int | None], name: str, widest: int) -> int | None:
    """The value of one size nearest to what it is with which the others work, if there is any."""
    k, hidden, heads = sizes["prefix_tokens"], sizes["sim_hidden"], sizes["sim_heads"]
    most = (heads or 2) * max(
        k or 1, widest
    )  # a width that works with any number of heads from 2 on
    tried: Iterable[int] = range(2, most + 1)
    if name == "prefix_tokens" and hidden is not None:
        tried = [hidden // (heads or _divisors(hidden)[1])]
    elif name == "sim_heads":
        tried = [2] if hidden is None else _divisors(hidden)
    works = (value for value in tried if _problem({**sizes, name: value}, widest) is None)
    return min(works, key=lambda value: abs(value - (sizes[name] or value)), default=None)


def _divisors(number: int) -> list[int]:
    """In ascending order, 1 and the number included."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
