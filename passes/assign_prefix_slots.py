"""Gives every weight that a `tint.prefix` reads its place in prefix tokens, and solves for K, D_sim and H_sim.

    tint.prefix(W)   ->   the same node; context.layout.prefix[slot] says where W lies

A linear layer's page holds R rows of C columns of W and the biases of those rows: token j has
S = ceil(R / K) rows side by side and all the biases, [w_jS, ..., w_jS+S-1, b], so S * C + R <= D_sim (TINT.md section 3). Larger
matrices take several pages; nothing has to divide. A norm's gain and shift share one token of a page, and a
page holds as many norms as it has tokens.

Solved: K and D_sim that minimise pages * (K * D_sim + 8 * (D_sim^2 / H_sim + D_sim * H_sim)), the prefix numbers
plus an estimate of each page's structural constants: 8 H_sim-split maps a page is what the paper's
OPT-125M spends (1.458 G constants over 217 pages, D_sim 3072, H_sim 12).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import fx

from tintc.compiler.dialect import argument, is_tint
from tintc.compiler.errors import UsageError
from tintc.compiler.layout import Layout, PrefixSlot, Range, Tile
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass

_MAPS_PER_PAGE = 8


@dataclass
class _Weights:
    """matrices: (weight read, read of its bias or None); vectors: reads of each norm, and biases whose weight another layer has."""

    matrices: list[tuple[fx.Node, fx.Node | None]] = field(default_factory=list)
    vectors: list[list[fx.Node]] = field(default_factory=list)


@graph_pass(requires=("tint_only",), ensures=("prefix_slots_disjoint",))
def assign_prefix_slots(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Raises UsageError for a K, D_sim or H_sim that cannot work, with the nearest that can."""
    weights = _collect(graph)
    hidden = max([context.facts.hidden, *(_columns(read) for reads in weights.vectors for read in reads)])
    k, d, h = _solve(weights, hidden, context)
    slots, pages = _place(weights, k, d)
    context.layout = Layout(prefix_tokens=k, sim_hidden=d, sim_heads=h, pages=pages, prefix=slots)
    return graph


def _collect(graph: fx.Graph) -> _Weights:
    weights, seen = _Weights(), set()
    for node in graph.nodes:
        if is_tint(node, "linear_forward"):
            matrix, bias = argument(node, "weight"), argument(node, "bias")
            own = bias if bias is not None and is_tint(bias, "prefix") and bias not in seen else None
            if is_tint(matrix, "prefix") and matrix not in seen:
                weights.matrices.append((matrix, own))
            elif own is not None:
                weights.vectors.append([own])
            seen.update({matrix, own})
        elif is_tint(node, "norm_forward"):
            reads = [argument(node, name) for name in ("gamma", "beta")]
            fresh = [r for r in reads if r is not None and is_tint(r, "prefix") and r not in seen]
            if fresh:
                weights.vectors.append(fresh)
                seen.update(fresh)
    return weights


def _columns(read: fx.Node) -> int:
    size = info(read).shape[-1]
    assert isinstance(size, int)
    return size


def _rows(read: fx.Node) -> int:
    size = info(read).shape[0]
    assert isinstance(size, int)
    return size


def _tiling(rows: int, columns: int, k: int, d: int) -> tuple[int, int, int]:
    """(pages, rows a page, columns a page) of a matrix, with the fewest pages."""
    best: tuple[int, int, int] | None = None
    for pieces in range(1, columns + 1):
        width = math.ceil(columns / pieces)
        page_rows = _page_rows(rows, width, k, d)
        if page_rows:
            pages = math.ceil(rows / page_rows) * math.ceil(columns / width)
            best = min(best or (pages, page_rows, width), (pages, page_rows, width))
            if pieces >= 2 * math.ceil(columns / d) + 1:
                break
    assert best is not None, f"a {rows} x {columns} matrix fits no page of {k} tokens of {d}"
    return best


def _page_rows(rows: int, width: int, k: int, d: int) -> int:
    """Most rows R with ceil(R / K) * width + R <= d."""
    best = 0
    for per_token in range(1, max(d // width, 1) + 1):
        best = max(best, min(per_token * k, d - per_token * width))
    return min(rows, best)


def _pages(weights: _Weights, k: int, d: int) -> int:
    shapes = [(_rows(w), _columns(w)) for w, _ in weights.matrices]
    counted = {shape: _tiling(*shape, k, d)[0] for shape in set(shapes)}
    return sum(counted[shape] for shape in shapes) + math.ceil(len(weights.vectors) / k)


def _solve(weights: _Weights, hidden: int, context: Context) -> tuple[int, int, int]:
    config = context.config
    widest_vectors = max((sum(_columns(r) for r in reads) for reads in weights.vectors), default=0)
    least = max(2 * hidden, widest_vectors)
    if config.sim_hidden is not None and config.sim_hidden < least:
        raise UsageError(
            f"sim_hidden is {config.sim_hidden}; expected at least {least}: a token holds the residual stream and a module's "
            f"result side by side. The nearest that works is {least}"
        )
    multiple = config.sim_heads or 1  # a width that is solved for is one that given heads divide
    solved = {math.ceil(max(least, hidden * m / 2) / multiple) * multiple for m in range(4, 17)}
    hidden_sizes = [config.sim_hidden] if config.sim_hidden else sorted(solved)
    powers = [2**i for i in range(2, 13)]
    token_counts = [config.prefix_tokens] if config.prefix_tokens else sorted({*powers, *(math.ceil(hidden / m) for m in range(1, 9))})
    best: tuple[float, int, int, int] | None = None
    for d in hidden_sizes:
        h = _heads(d, config.sim_heads)
        for k in token_counts:
            numbers = _pages(weights, k, d) * (k * d + _MAPS_PER_PAGE * (d * d / h + d * h))
            best = min(best or (numbers, k, d, h), (numbers, k, d, h))
    assert best is not None
    return best[1:]


def _heads(d: int, wanted: int | None) -> int:
    divisors = [h for h in range(1, d + 1) if d % h == 0]
    if wanted is None:
        return min(divisors, key=lambda h: d / h + h)
    if d % wanted:
        nearest = min(divisors, key=lambda h: abs(h - wanted))
        raise UsageError(
            f"sim_heads is {wanted}; expected a divisor of sim_hidden, {d}: each head holds an equal piece. "
            f"The nearest that works is {nearest}"
        )
    return wanted


def _place(weights: _Weights, k: int, d: int) -> tuple[dict[str, PrefixSlot], int]:
    slots: dict[str, PrefixSlot] = {}
    page = 0
    for matrix, bias in weights.matrices:
        rows, columns = _rows(matrix), _columns(matrix)
        _, page_rows, width = _tiling(rows, columns, k, d)
        tiles, bias_tiles = [], []
        for top in range(0, rows, page_rows):
            for left in range(0, columns, width):
                part = Range(top, min(top + page_rows, rows)), Range(left, min(left + width, columns))
                per_token = math.ceil(part[0].size / k)
                tokens = Range(0, math.ceil(part[0].size / per_token))
                reach = per_token * part[1].size
                tiles.append(Tile(page, *part, per_token, tokens, Range(0, reach)))
                if left == 0:  # the bias of these rows stands once, in the first page that has them
                    bias_tiles.append(
                        Tile(page, part[0], Range(0, 1), part[0].size, tokens, Range(reach, reach + part[0].size), replicated=True)
                    )
                page += 1
        _add(slots, matrix, tiles)
        if bias is not None:
            _add(slots, bias, bias_tiles)
    for index, reads in enumerate(weights.vectors):
        token, start = index % k, 0
        for read in reads:
            size = _columns(read)
            where = Range(token, token + 1), Range(start, start + size)
            _add(slots, read, [Tile(page + index // k, Range(0, size), Range(0, 1), size, *where)])
            start += size
    return slots, page + math.ceil(len(weights.vectors) / k)


def _add(slots: dict[str, PrefixSlot], read: fx.Node, tiles: list[Tile]) -> None:
    record, parameter = info(read), info(argument(read, "parameter"))
    assert record.slot is not None
    assert parameter.parameter is not None
    rows = Range(argument(read, "start"), argument(read, "stop"))
    shape = tuple(int(size) for size in record.shape)
    slots[record.slot] = PrefixSlot(
        record.slot, parameter.parameter, rows, argument(read, "transpose"), shape, record.trainable, tuple(tiles)
    )
