"""One stage of the graph in columns: thousands of nodes in a few hundred kB."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tintc.compiler.node_costs import NodeCost, NodeCosts
from tintc.ir.facts import ModelFacts
from tintc.ir.layout import Layout
from tintc.ir.records import NodeRecord, arguments_text, shape_text
from tintc.page.strings import NONE, Strings

LONGEST_ARGUMENTS = 400
_FREE = NodeCost(0, 0)


def graph_file(
    stage: str,
    records: Sequence[NodeRecord],
    before: Sequence[NodeRecord] | None,
    *,
    costs: NodeCosts,
    layout: Layout | None,
    facts: ModelFacts,
    note: str,
) -> dict[str, Any]:
    """data/graph-STAGE.json. before: the stage in front of it. layout: where memory slots belong to
    its nodes.
    """
    strings = Strings()
    groups = _Groups(facts)
    known = {record.name: record for record in before or records}
    rows = [
        _row(record, known, costs.get(record.name, _FREE), layout, strings, groups)
        for record in records
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    return {
        "stage": stage,
        "nodes": columns,
        "edges": _edges(records),
        "removed": len(set(known) - {record.name for record in records}),
        "note": note,
        "groups": groups.listed,
        "strings": strings.table,
    }


def module_of(record: NodeRecord) -> str:
    """Path of the module that a node belongs to; a parameter belongs to the one that holds it."""
    module: str = record.info.get("module", "")
    return module or str(record.info.get("parameter", "")).rpartition(".")[0]


def _row(
    record: NodeRecord,
    known: Mapping[str, NodeRecord],
    cost: NodeCost,
    layout: Layout | None,
    strings: Strings,
    groups: _Groups,
) -> dict[str, int]:
    info, module = record.info, module_of(record)
    shape = record.shape or list(cost.shape or ())  # emitted nodes have none of their own
    memory = record.name if layout is not None and record.name in layout.memory else None
    return {
        "name_s": strings(record.name),
        "operator_s": strings(record.operator),
        "kind_s": strings(record.kind),
        "phase_s": strings(info.get("phase") or ""),
        "step": info.get("step", NONE) if info.get("phase") else NONE,
        "module_s": strings(module),
        "source_s": strings(info.get("source")),
        "shape_s": strings(shape_text(shape)),
        "dtype_s": strings(info.get("dtype", "float")),
        "slot_s": strings(info.get("slot")),
        "memory_s": strings(memory),
        "trainable": int(bool(info.get("trainable"))),
        "args_s": strings(_shortened(arguments_text(record))),
        "flops": cost.flops,
        "bytes": cost.bytes,
        "change_s": strings(_change(record, known.get(record.name))),
        "group": groups.of(module),
    }


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_ARGUMENTS else f"{text[:LONGEST_ARGUMENTS]}..."


def _change(record: NodeRecord, before: NodeRecord | None) -> str:
    """By name, operator and arguments."""
    if before is None:
        return "new"
    now, then = ((r.operator, r.args, r.kwargs) for r in (record, before))
    return "same" if now == then else "changed"


def _edges(records: Iterable[NodeRecord]) -> dict[str, list[int]]:
    places: dict[str, int] = {}
    begins: list[int] = []
    ends: list[int] = []
    for index, record in enumerate(records):
        sources = [places[name] for name in record.inputs()]
        begins += sources
        ends += [index] * len(sources)
        places[record.name] = index
    return {"from": begins, "to": ends}


class _Groups:
    """The modules of a graph as a tree, each behind the one that holds it."""

    def __init__(self, facts: ModelFacts) -> None:
        self.listed: list[dict[str, Any]] = []
        self._facts = facts
        self._places: dict[str, int] = {"": NONE}

    def of(self, path: str) -> int:
        """Index of a module's group; NONE for none."""
        if path not in self._places:
            parent, _, label = path.rpartition(".")
            entry = {
                "path": path,
                "parent": self.of(parent),
                "label": label,
                "block": self._block(path),
            }
            self._places[path] = len(self.listed)
            self.listed.append(entry)
        return self._places[path]

    def _block(self, path: str) -> int:
        """Number of the block that a module is, or is part of."""
        number, _ = self._facts.place(path)
        return int(number) if number else NONE
