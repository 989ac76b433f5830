"""What `inspect --format model-explorer` writes, read by a small reader of its format, and by its
own package where that is installed.
"""

import json
from functools import cache
from typing import Any

import pytest

from tests.support.artifacts import artifact
from tests.support.command import tintc
from tests.support.pages import HOSTILE, column, content, hostile
from tintc.page.model_explorer import model_explorer_file


@cache
def document(stage: str = "lowered") -> dict[str, Any]:
    done = tintc("inspect", artifact(), "--format", "model-explorer", "--stage", stage)
    assert done.code == 0, done
    found: dict[str, Any] = json.loads(done.out)
    return found


_NODE = {
    "id": str,
    "label": str,
    "namespace": str,
    "attrs": list,
    "incomingEdges": list,
    "outputsMetadata": list,
    "style": dict,
}


def read(found: dict[str, Any]) -> dict[str, Any]:
    """The nodes by id, after checking every field of the format."""
    (graph,) = found["graphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    spaces = set()
    for node in graph["nodes"]:
        assert set(node) <= set(_NODE) and all(isinstance(node[k], _NODE[k]) for k in node)
        for pair in (*node["attrs"], *(p for o in node["outputsMetadata"] for p in o["attrs"])):
            assert set(pair) == {"key", "value"} and all(isinstance(v, str) for v in pair.values())
        for edge in node["incomingEdges"]:
            assert edge["sourceNodeId"] in nodes
            assert edge["targetNodeInputId"].isdecimal()
        parts = node["namespace"].split("/")
        spaces |= {"/".join(parts[: depth + 1]) for depth in range(len(parts))}
    assert set(graph["groupNodeAttributes"]) == spaces - {""}
    for data in found["nodeData"].values():
        assert set(data) == {graph["id"]} and set(data[graph["id"]]["results"]) <= set(nodes)
    return nodes


@pytest.mark.parametrize("stage", ["captured", "canonical", "lowered", "optimized", "emitted"])
def test_nodes_are_ours(stage: str) -> None:
    nodes, graph = read(document(stage)), content(f"graph-{stage}")
    names = column(graph, "name_s")
    assert list(nodes) == names
    edges = {(names[a], names[b]) for a, b in zip(*graph["edges"].values(), strict=True)}
    assert edges == {
        (edge["sourceNodeId"], name)
        for name, node in nodes.items()
        for edge in node["incomingEdges"]
    }


def test_groups_and_node_data_are_ours() -> None:
    nodes, graph = read(document()), content("graph-lowered")
    columns = zip(*(column(graph, n) for n in ("name_s", "module_s", "phase_s")), strict=True)
    for name, module, phase in columns:
        lane, _, path = nodes[name]["namespace"].partition("/") if phase else ("", "", None)
        found = nodes[name]["namespace"] if path is None else path
        assert found == module.replace(".", "/")
        assert not phase or phase in lane
    data = document()["nodeData"]
    for name, ours in (("FLOPs", "flops"), ("bytes", "bytes")):
        results = data[name]["lowered"]["results"]
        kinds = zip(*(column(graph, n) for n in ("name_s", ours, "kind_s")), strict=True)
        assert {n: {"value": v} for n, v, kind in kinds if kind == "call"} == results
    slots = zip(column(graph, "name_s"), column(graph, "slot_s"), strict=True)
    expected = {name: {"value": slot} for name, slot in slots if slot is not None}
    assert data["slot"]["lowered"]["results"] == expected
    total = sum(graph["nodes"]["flops"])
    groups = document()["graphs"][0]["groupNodeAttributes"]
    assert sum(int(g["FLOPs"]) for space, g in groups.items() if "/" not in space) == total


def test_hostile_names_stay_in_their_group() -> None:
    nodes = read(model_explorer_file(hostile(), "lowered"))
    spaces = {node["namespace"].rpartition("/")[2] for node in nodes.values()}
    assert {name.replace("/", "\u2215") for name in HOSTILE} <= spaces


def test_its_own_package_reads_it() -> None:
    reason = "needs the package ai-edge-model-explorer"
    dacite = pytest.importorskip("dacite", reason=reason)
    builder = pytest.importorskip("model_explorer.graph_builder", reason=reason)
    node_data = pytest.importorskip("model_explorer.node_data_builder", reason=reason)
    config = dacite.Config(strict=True)
    found = document()
    for graph in found["graphs"]:
        read_back = dacite.from_dict(builder.Graph, graph, config)
        assert len(read_back.nodes) == len(graph["nodes"])
    for data in found["nodeData"].values():
        for part in data.values():
            numbers = {k: v for k, v in part["results"].items() if not isinstance(v["value"], str)}
            dacite.from_dict(node_data.GraphNodeData, {**part, "results": numbers}, config)
