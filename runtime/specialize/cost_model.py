"""Low-rank or materialized: which updates stay factors, from shapes alone.

A materialized update of an O x I weight costs its descents, 2 S I O operations a step, and for
every step an own copy of the weight in and out of memory; the products then cost what shared ones
cost. Factors cost 2 R S k (I + O) operations for each product of R tokens after k steps, on top of
the shared product. So factors win for few training tokens and large weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from torch import fx

from tintc.ir.calibration import Calibration
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_backward, linear_descent, linear_forward
from tintc.ir.ops.states import change_square, descend, fade, toward
from tintc.passes.analysis.update_forms import Forms


@dataclass(frozen=True)
class SlotUse:
    """rows, columns of a slot's weight; descents: how many; reads: (whole sequence or segment,
    factors before) of each product. passes: what the inner rule does besides to weights and states,
    number by number. squares: products of two steps' gradients, from products of tokens, that stand
    for sums of squares over the weight.
    """

    rows: int
    columns: int
    descents: int
    reads: tuple[tuple[bool, int], ...]
    passes: int = 0
    squares: int = 0

    def least_products(self, tokens: int, segment: int) -> int:
        """FLOPs that no form of the update does without: its descents, or, where that is less, one
        product of each read with its factors; the other one may be shared by several layers.
        """
        own = self.descents * 2 * segment * self.rows * self.columns
        side = min(self.rows, self.columns)
        read = sum((tokens if whole else segment) * k for whole, k in self.reads)
        return min(own, 2 * read * segment * side)

    def factors_win(
        self, tokens: int, segment: int, element_bytes: int, speed: Calibration
    ) -> bool:
        """Whether factors are cheaper than own weights, for one sequence of `tokens`, of which
        training passes see `segment`. What is compared are operations of the fastest product that
        take as long.
        """

        def cost(rows: int, inner: int, columns: int) -> float:
            return 2 * rows * inner * columns * speed.slowness(rows, inner, columns)

        low_rank = sum(
            cost(tokens if whole else segment, self.columns, segment * k)
            + cost(tokens if whole else segment, segment * k, self.rows)
            for whole, k in self.reads
        )
        low_rank += self.squares * (
            cost(segment, self.columns, segment) + cost(segment, self.rows, segment)
        )
        moved = self.rows * self.columns * element_bytes * speed.operations_per_byte
        descent = cost(self.rows, segment, self.columns) + 2 * moved
        return low_rank < self.descents * descent + 3 * self.passes * moved


def slot_uses(graph: fx.Graph) -> dict[str, SlotUse]:
    """How each weight of a lowered graph is used whose updates can stay factors."""
    forms = Forms(graph, with_rates=False)
    reads: dict[str, list[tuple[bool, int]]] = defaultdict(list)
    sizes: dict[str, tuple[int, int]] = {}
    descents: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    squares: dict[str, int] = {}
    for node in graph.nodes:
        slot = (info(node).slot or "").partition("/")[0]  # a state is part of its slot
        if is_tint(node, linear_descent) and slot:
            descents[slot] += 1
        elif is_tint(node, fade, descend, toward) and len(info(node).shape) == 3:
            passes[slot] += 1
        elif is_tint(node, change_square):
            form = forms.of(argument(node, "value"))
            if form.terms and form.base is not None:
                slot = info(form.base).slot or ""
                passes[slot] += 1
                squares[slot] = len(form.terms) * (len(form.terms) + 1) // 2  # the last has all
        elif is_tint(node, linear_forward, linear_backward):
            weight = argument(node, "weight")
            form = forms.of(weight)
            if form.terms and form.base is not None:
                slot = info(form.base).slot or ""
                rows, columns = info(weight).shape[-2:]
                assert isinstance(rows, int) and isinstance(columns, int)
                sizes[slot] = rows, columns
                reads[slot].append((info(node).shape[1] == "T", len(form.terms)))
    return {
        slot: SlotUse(*size, descents[slot], tuple(reads[slot]), passes[slot], squares.get(slot, 0))
        for slot, size in sizes.items()
    }
