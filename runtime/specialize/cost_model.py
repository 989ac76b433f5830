"""Low-rank or materialized: which updates stay factors, from shapes alone.

A materialized update of an O x I weight costs its descents, 2 S I O operations a step, and for
every step an own copy of the weight in and out of memory; the products then cost what shared ones
cost. Factors cost 2 R S k (I + O) operations for each product of R tokens after k steps, on top of
the shared product. So factors win for few training tokens and large weights.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_backward, linear_descent, linear_forward

# Operations that take as long as moving one byte to or from memory; about 400 GFLOP/s by 15 GB/s on
# two CPU cores, 400 TFLOP/s by 3 TB/s on an H100. A slot's choice is only sensitive to it where
# both forms cost about the same.
OPERATIONS_PER_BYTE = {"cpu": 27, "cuda": 130}


@dataclass(frozen=True)
class SlotUse:
    """rows, columns of a slot's weight; descents: how many; reads: (whole sequence or segment,
    descents before) of each product.
    """

    rows: int
    columns: int
    descents: int
    reads: tuple[tuple[bool, int], ...]

    def factors_win(self, tokens: int, segment: int, element_bytes: int, device: str) -> bool:
        """Whether factors are cheaper than own weights, for one sequence of `tokens`, of which
        training passes see `segment`.
        """
        low_rank = sum(
            2 * (tokens if whole else segment) * segment * k * (self.rows + self.columns)
            for whole, k in self.reads
        )
        numbers = self.rows * self.columns
        moved = (
            2
            * numbers
            * element_bytes
            * OPERATIONS_PER_BYTE.get(device, OPERATIONS_PER_BYTE["cuda"])
        )
        return low_rank < self.descents * (2 * segment * numbers + moved)


def slot_uses(graph: fx.Graph) -> dict[str, SlotUse]:
    """How each trained weight of a lowered graph is used."""
    depth: dict[fx.Node, int] = {}
    reads: dict[str, list[tuple[bool, int]]] = defaultdict(list)
    sizes: dict[str, tuple[int, int]] = {}
    made: dict[str, int] = defaultdict(int)
    for node in graph.nodes:
        if is_tint(node, linear_descent):
            slot = info(node).slot
            rows, columns = info(node).shape[-2:]
            assert slot is not None and isinstance(rows, int) and isinstance(columns, int)
            depth[node] = depth.get(argument(node, "weight"), 0) + 1
            sizes[slot], made[slot] = (rows, columns), made[slot] + 1
        elif is_tint(node, linear_forward, linear_backward) and argument(node, "weight") in depth:
            weight = argument(node, "weight")
            reads[info(weight).slot or ""].append((info(node).shape[1] == "T", depth[weight]))
    return {slot: SlotUse(*sizes[slot], made[slot], tuple(reads[slot])) for slot in sizes}
