"""Who lives where, and when: prefix pages and memory ranges over the lowered program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from tintc.ir.lanes import record_lane
from tintc.ir.layout import Layout, PrefixSlot
from tintc.ir.program import Program
from tintc.ir.records import NodeRecord, shape_text


def slots_file(program: Program) -> dict[str, Any]:
    """data/slots.json. A program index counts the calls of the lowered graph."""
    records, layout = program.stages["lowered"], program.layout
    steps = program.config.unrolled_steps
    calls = [record for record in records if record.kind == "call"]
    places = {record.name: index for index, record in enumerate(calls)}
    uses = _Uses(records)
    memory = [
        {
            "name": slot.name,
            "first": slot.coordinates.start,
            "size": slot.coordinates.size,
            "from": places.get(slot.name, 0),
            "until": places.get(slot.last, len(calls) - 1),  # the output reads behind all calls
            "kept": slot.kept,
        }
        for slot in layout.memory.values()
    ]
    return {
        "layout": {
            name: getattr(layout, name)
            for name in ("prefix_tokens", "sim_hidden", "sim_heads", "pages", "memory_width")
        },
        "program": [{"name": r.name, "lane": record_lane(r, steps)} for r in calls],
        "prefix": [_prefix(slot, uses, places) for slot in layout.prefix.values()],
        "memory": memory,
        "occupancy": {
            "prefix": _numbers(layout) / layout.prefix_numbers,
            "memory_peak": _peak(memory, len(calls)),
        },
    }


class _Uses:
    """Which nodes of the lowered graph hold a slot's value, and which read one."""

    def __init__(self, records: Sequence[NodeRecord]) -> None:
        self.index = {record.name: index for index, record in enumerate(records)}
        self.holds: dict[str, list[NodeRecord]] = defaultdict(list)
        self.reads: dict[str, list[NodeRecord]] = defaultdict(list)
        self.makes: dict[str, list[NodeRecord]] = defaultdict(list)  # what a value is taken from
        by_name = {record.name: record for record in records}
        slots: dict[str, str] = {}
        for record in records:
            slot = record.info.get("slot")
            sources = [by_name[name] for name in record.inputs()]
            if slot is not None:
                slots[record.name] = slot
                self.holds[slot].append(record)
                # of an operator with several results; of the first value, its parameter
                taken = record.operator == "getitem"
                self.makes[slot] += [r for r in sources if taken or r.kind == "parameter"]
            if record.kind == "call":
                for read in dict.fromkeys(slots[r.name] for r in sources if r.name in slots):
                    self.reads[read].append(record)

    def path(self, slot: str) -> list[int]:
        """Nodes that a slot's value runs through, in order: the parameter, its first value, what
        reads it, each value that a descent makes of it, what reads that.
        """
        along = (*self.makes[slot], *self.holds[slot], *self.reads[slot])
        return sorted({self.index[record.name] for record in along})


def _prefix(slot: PrefixSlot, uses: _Uses, places: dict[str, int]) -> dict[str, Any]:
    written = [r for r in uses.holds[slot.name] if r.info.get("phase") == "descent"]
    tiles = [
        {
            "page": tile.page,
            "tokens": [tile.tokens.start, tile.tokens.stop],
            "groups": tile.groups,
            "coordinates": [tile.coordinates.start, tile.coordinates.stop],
        }
        for tile in slot.tiles
    ]
    held = sum(tile.tokens.size * tile.coordinates.size for tile in slot.tiles)
    return {
        "name": slot.name,
        "parameter": slot.parameter,
        "shape": shape_text(list(slot.shape)),
        "numbers": slot.numbers,
        "updated": slot.updated,
        "trainable": slot.trainable,
        "tiles": tiles,
        "padding": held - slot.numbers,
        "read_at": [places[r.name] for r in uses.reads[slot.name]],
        "written_at": [places[r.name] for r in written],
        "path": uses.path(slot.name),
    }


def _numbers(layout: Layout) -> int:
    return sum(slot.numbers for slot in layout.prefix.values())


def _peak(memory: list[dict[str, Any]], calls: int) -> float:
    """The most coordinates that are in use at once, as a share of the width; 0 of no width."""
    used = np.zeros(calls + 1, np.int64)
    for slot in memory:
        used[slot["from"]] += slot["size"]
        used[slot["until"] + 1] -= slot["size"]
    width = max((slot["first"] + slot["size"] for slot in memory), default=0)
    return float(used.cumsum().max() / width) if width else 0.0
