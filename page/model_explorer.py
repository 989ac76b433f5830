"""The graph as Model Explorer reads it (pip package ai-edge-model-explorer): a collection of one
graph, whose groups are lanes and modules, and node data beside it.

    {"label", "graphs": [{"id", "nodes", "groupNodeAttributes"}],
     "nodeData": {"FLOPs": {GRAPH: {"results": {NODE: {"value"}}, "gradient"}}, "bytes", "slot"}}

Its web app opens the file as it is. Node data are files of their own there: each entry of
`nodeData` is one (docs/guides/page.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tintc.compiler.node_costs import NodeCost, NodeCosts
from tintc.ir.lanes import record_lane
from tintc.ir.named import Stage
from tintc.ir.records import NodeRecord, arguments_text, shape_text
from tintc.page.graphs import module_of
from tintc.page.stage_costs import stage_parts
from tintc.runtime.simulator import Simulator

_SLASH = "\u2215"  # in a module's name: a plain one would make a group of its own
_FREE = NodeCost(0, 0)
_PALE, _FULL = "#f7fbff", "#4292c6"
_COLORS = {"forward": "#cfe2f3", "backward": "#f9d9c0", "descent": "#cdeae0"}


def model_explorer_file(simulator: Simulator, stage: Stage) -> dict[str, Any]:
    """The document for one stage."""
    records, costs = stage_parts(simulator, stage)
    steps = simulator.config.unrolled_steps
    spaces = {record.name: _namespace(record, steps) for record in records}
    nodes = [_node(r, spaces[r.name], costs.get(r.name, _FREE)) for r in records]
    graph = {
        "id": stage,
        "nodes": nodes,
        "groupNodeAttributes": _groups(records, spaces, costs),
    }
    return {
        "label": str(simulator.source.get("name") or "simulator"),
        "graphs": [graph],
        "nodeData": _node_data(stage, records, costs),
    }


def _namespace(record: NodeRecord, steps: int) -> str:
    """`step 0 backward/model/decoder/layers/0`."""
    path = module_of(record).replace("/", _SLASH)
    parts = [record_lane(record, steps), *path.split(".")]
    return "/".join(part for part in parts if part)


def _node(record: NodeRecord, namespace: str, cost: NodeCost) -> dict[str, Any]:
    info = record.info
    attributes: dict[str, str] = {
        "operator": record.operator,
        "arguments": arguments_text(record),
        "FLOPs": str(cost.flops),
        "bytes": str(cost.bytes),
    }
    further = ("module", "source", "phase", "step", "slot", "parameter")
    attributes |= {name: str(info[name]) for name in further if name in info}
    shape = shape_text(record.shape or list(cost.shape or ()))
    color = _COLORS.get(info.get("phase", ""))
    return {
        "id": record.name,
        "label": record.operator if record.kind == "call" else record.name,
        "namespace": namespace,
        "attrs": _pairs(attributes),
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
            for place, source in enumerate(record.inputs())
        ],
        "outputsMetadata": [
            {"id": "0", "attrs": _pairs({"tensor_name": record.name, "shape": shape})}
        ],
        **({"style": {"backgroundColor": color}} if color else {}),
    }


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _groups(
    records: Sequence[NodeRecord], spaces: Mapping[str, str], costs: NodeCosts
) -> dict[str, dict[str, str]]:
    """What the nodes inside each group cost together."""
    flops: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    for record in records:
        cost, parts = costs.get(record.name, _FREE), spaces[record.name].split("/")
        for depth in range(1, len(parts) + 1):
            flops["/".join(parts[:depth])] += cost.flops
            moved["/".join(parts[:depth])] += cost.bytes
    return {
        space: {"FLOPs": str(flops[space]), "bytes": str(moved[space])} for space in flops if space
    }


def _node_data(stage: str, records: Sequence[NodeRecord], costs: NodeCosts) -> dict[str, Any]:
    shades = [{"stop": 0, "bgColor": _PALE}, {"stop": 1, "bgColor": _FULL}]
    counted = {
        "FLOPs": {name: cost.flops for name, cost in costs.items()},
        "bytes": {name: cost.bytes for name, cost in costs.items()},
    }
    slots = {record.name: record.info["slot"] for record in records if "slot" in record.info}
    found = {name: _results(values, shades) for name, values in counted.items()}
    return {name: {stage: data} for name, data in {**found, "slot": _results(slots, [])}.items()}


def _results(values: Mapping[str, Any], gradient: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "results": {name: {"value": value} for name, value in values.items()},
        "gradient": gradient,
    }
