"""What `inspect --format model-explorer` writes, opened in Model Explorer's own web app."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.artifacts import artifact
from tests.support.browser import Watched, why_no_browser
from tests.support.command import tintc
from tests.support.model_explorer import (
    GROUP,
    counts,
    explored,
    graph_made,
    node_data,
    why_no_model_explorer,
)
from tests.support.pages import column, content

WHY_NOT = why_no_browser() or why_no_model_explorer()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    file = tmp_path_factory.mktemp("explored") / "tiny.json"
    done = tintc("inspect", artifact(), "--format", "model-explorer", "--stage", "lowered")
    assert done.code == 0, done
    file.write_text(done.out, encoding="utf-8")
    with explored(file) as page:
        yield page


def ours() -> dict[str, Any]:
    """The graph as the page has it."""
    found: dict[str, Any] = content("graph-lowered")
    return found


def spaces() -> list[str]:
    """Where each node stands: lane and modules."""
    columns = (column(ours(), name) for name in ("phase_s", "step", "module_s"))
    found = []
    for phase, step, module in zip(*columns, strict=True):
        last = phase == "forward" and step == content("site")["steps"]
        lane = "last forward" if last else f"step {step} {phase}"
        found.append("/".join(filter(None, (lane if phase else "", module.replace(".", "/")))))
    return found


def test_nodes_and_groups_are_ours(app: Watched) -> None:
    names, expected = column(ours(), "name_s"), spaces()
    groups = {
        "/".join(parts[: depth + 1])
        for parts in (space.split("/") for space in expected if space)
        for depth in range(len(parts))
    }
    assert counts(app) == {"op node count": len(names), "layer count": len(groups)}
    made = graph_made(app)["nodes"]
    assert {n["id"].removesuffix(GROUP) for n in made if n["id"].endswith(GROUP)} == groups
    found = {n["id"]: n["fullNamespace"] for n in made if not n["id"].endswith(GROUP)}
    assert found == dict(zip(names, expected, strict=True))


def test_edges_are_ours(app: Watched) -> None:
    graph = ours()
    names = column(graph, "name_s")
    expected = sorted((names[a], names[b]) for a, b in zip(*graph["edges"].values(), strict=True))
    found = sorted(
        (node["id"], edge["targetNodeId"])
        for node in graph_made(app)["nodes"]
        for edge in node.get("outgoingEdges", ())
    )
    assert found == expected


def test_node_data_are_ours(app: Watched) -> None:
    graph = ours()
    kinds, slots = column(graph, "kind_s"), column(graph, "slot_s")
    operators = column(graph, "operator_s")
    labels = [
        operator if kind == "call" else name
        for operator, kind, name in zip(operators, kinds, column(graph, "name_s"), strict=True)
    ]
    costs = [
        [str(n) if kind == "call" else "-" for n, kind in zip(numbers, kinds, strict=True)]
        for numbers in (graph["nodes"]["flops"], graph["nodes"]["bytes"])
    ]
    shown = ["-" if slot is None else slot for slot in slots]
    expected = [list(row) for row in zip(labels, *costs, shown, strict=True)]
    assert node_data(app, len(labels)) == expected


def test_groups_say_what_they_cost(app: Watched) -> None:
    """Each the sum of its nodes."""
    said, nodes, where = graph_made(app)["groupNodeAttributes"], ours()["nodes"], spaces()
    for group, attributes in said.items():
        inside = [f"{space}/".startswith(f"{group}/") for space in where]
        for key, name in (("FLOPs", "flops"), ("bytes", "bytes")):
            total = sum(n for n, here in zip(nodes[name], inside, strict=True) if here)
            assert int(attributes[key]) == total, group


def test_picture(app: Watched) -> None:
    """Where a folder is asked for."""
    folder = os.environ.get("TINTC_SCREENSHOTS")
    if not folder:
        pytest.skip("TINTC_SCREENSHOTS names no folder")
    app.tab.screenshot(path=Path(folder) / "model-explorer.png")
