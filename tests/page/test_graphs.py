"""The data files of a site against the artifact that it was made from."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import tintc
from tests.support.artifacts import artifact
from tests.support.nano import nano
from tests.support.pages import HOSTILE, column, content, hostile, site
from tintc.compiler.artifact_reader import read_graph, read_manifest
from tintc.ir.config import SimulatorConfig
from tintc.ir.ops import OPERATORS
from tintc.ir.records import NodeRecord
from tintc.page.site import write_site

STAGES = ("captured", "canonical", "lowered", "optimized", "emitted")


def lowered() -> list[NodeRecord]:
    return read_graph(artifact()).records()["lowered"]


class TestGraphs:
    @pytest.mark.parametrize("stage", STAGES)
    def test_columns_fit(self, stage: str) -> None:
        graph = content(f"graph-{stage}")
        nodes, edges, groups = graph["nodes"], graph["edges"], graph["groups"]
        sizes = {len(values) for values in nodes.values()}
        assert len(sizes) == 1 and len(graph["strings"]) == len(set(graph["strings"]))
        count = sizes.pop()
        for name, values in nodes.items():
            if name.endswith("_s"):
                assert all(-1 <= value < len(graph["strings"]) for value in values), name
        assert all(
            a < b < count for a, b in zip(edges["from"], edges["to"], strict=True)
        )  # a node reads earlier ones
        assert all(-1 <= group < len(groups) for group in nodes["group"])
        assert all(entry["parent"] < index for index, entry in enumerate(groups))
        assert set(column(graph, "kind_s")) <= {"input", "parameter", "call", "output"}
        assert set(column(graph, "phase_s")) <= {"", "forward", "backward", "descent"}
        assert set(column(graph, "change_s")) <= {"same", "changed", "new"}

    @pytest.mark.parametrize("stage", ["captured", "canonical", "lowered"])
    def test_is_the_artifacts(self, stage: str) -> None:
        graph, records = content(f"graph-{stage}"), read_graph(artifact()).records()[stage]
        assert column(graph, "name_s") == [record.name for record in records]
        assert column(graph, "operator_s") == [record.operator for record in records]
        names = column(graph, "name_s")
        edges = zip(graph["edges"]["from"], graph["edges"]["to"], strict=True)
        assert {(names[a], names[b]) for a, b in edges} == {
            (source, record.name) for record in records for source in record.inputs()
        }
        shapes = ["(" + ", ".join(map(str, record.shape)) + ")" for record in records]
        assert column(graph, "shape_s") == shapes

    def test_what_a_pass_changed(self) -> None:
        stages = read_graph(artifact()).records()
        for before, after in (("captured", "canonical"), ("canonical", "lowered")):
            known = {r.name: (r.operator, r.args, r.kwargs) for r in stages[before]}
            graph = content(f"graph-{after}")
            for record, change in zip(stages[after], column(graph, "change_s"), strict=True):
                same = known.get(record.name) == (record.operator, record.args, record.kwargs)
                assert (change == "same") == same
                assert (change == "new") == (record.name not in known)
            assert (
                graph["removed"] == len(set(known) - {r.name for r in stages[after]})
                or not (graph["removed"])
            )
        assert content("graph-canonical")["removed"] > 0

    def test_every_emitted_call_knows_where_it_comes_from(self) -> None:
        graph = content("graph-emitted")
        rows = zip(*(column(graph, n) for n in ("kind_s", "phase_s", "step")), strict=True)
        calls = [(phase, step) for kind, phase, step in rows if kind == "call"]
        assert {(p, s) for p, s in calls if p} == {
            ("forward", 0),
            ("backward", 0),
            ("descent", 0),
            ("forward", 1),
        }
        # what belongs to no phase reads weights: views that emitted code writes as well
        assert sum(phase == "" for phase, _ in calls) < len(calls) / 10
        assert "parameter" in column(graph, "kind_s")

    def test_groups_are_the_module_tree(self) -> None:
        graph = content("graph-lowered")
        groups = graph["groups"]
        for group in groups:
            parent = groups[group["parent"]]["path"] + "." if group["parent"] >= 0 else ""
            assert group["path"] == parent + group["label"]
        blocks = {group["path"]: group["block"] for group in groups}
        assert blocks["model.decoder.layers"] == -1
        assert blocks["model.decoder.layers.1"] == blocks["model.decoder.layers.1.fc1"] == 1
        modules = column(graph, "module_s")
        inner = [groups[g]["path"] if g >= 0 else "" for g in graph["nodes"]["group"]]
        assert inner == modules

    def test_operators_are_the_dialects(self) -> None:
        found = content("operators")
        used = {name for s in STAGES for name in column(content(f"graph-{s}"), "operator_s")}
        assert {name for name in used if name.startswith("tint.")} <= set(found) <= used
        for name, entry in found.items():
            operator = OPERATORS[name.removeprefix("tint.")]
            assert entry["meaning"] == operator.meaning
            assert " ".join((operator.__doc__ or "").split()) == " ".join(entry["formula"].split())
        assert found["tint.linear_forward"]["family"] == "linear"


class TestSlots:
    def test_prefix_is_the_layouts(self) -> None:
        layout, found = read_manifest(artifact()).layout, content("slots")["prefix"]
        assert [slot["name"] for slot in found] == list(layout.prefix)
        for slot in found:
            own = layout.prefix[slot["name"]]
            assert [t["page"] for t in slot["tiles"]] == [t.page for t in own.tiles]
            covered = sum(
                (t["tokens"][1] - t["tokens"][0]) * (t["coordinates"][1] - t["coordinates"][0])
                for t in slot["tiles"]
            )
            assert covered == slot["numbers"] + slot["padding"] and slot["padding"] >= 0
            assert slot["updated"] == own.updated
            assert slot["shape"] == "(" + ", ".join(map(str, own.shape)) + ")"

    def test_memory_never_holds_two(self) -> None:
        found = content("slots")
        for index in range(len(found["program"])):
            held = sorted(
                (slot["first"], slot["first"] + slot["size"])
                for slot in found["memory"]
                if slot["from"] <= index <= slot["until"]
            )
            assert all(a[1] <= b[0] for a, b in pairwise(held))
        assert 0 < found["occupancy"]["memory_peak"] <= 1
        assert 0 < found["occupancy"]["prefix"] <= 1

    def test_lanes_follow_each_other(self) -> None:
        program = content("slots")["program"]
        lanes = list(dict.fromkeys(entry["lane"] for entry in program if entry["lane"]))
        assert lanes == ["step 0 forward", "step 0 backward", "step 0 descent", "last forward"]
        assert [entry["name"] for entry in program] == [
            record.name for record in lowered() if record.kind == "call"
        ]

    @pytest.mark.slow
    def test_a_weight_through_all_steps(self, tmp_path: Path) -> None:
        """prefix -> forward -> backward, descent -> next forward, for each of three steps."""
        config = SimulatorConfig.exact(inner_lr=0.01, steps=3)
        found = write_site(tintc.compile(nano(), config), tmp_path / "site")
        slots, graph = content("slots", found.path), content("graph-lowered", found.path)
        slot = next(s for s in slots["prefix"] if s["name"] == "blocks.1.up.weight")
        operators = [column(graph, "operator_s")[i] for i in slot["path"]]
        step = ["tint.linear_forward", "tint.linear_backward", "tint.linear_descent"]
        assert operators == ["placeholder", "tint.prefix", *step * 3, "tint.linear_forward"]
        lanes = [slots["program"][i]["lane"] for i in slot["written_at"]]
        assert lanes == ["step 0 descent", "step 1 descent", "step 2 descent"]
        assert slots["program"][slot["read_at"][-1]]["lane"] == "last forward"


def test_hostile_names_are_plain_data(tmp_path: Path) -> None:
    found = write_site(hostile(), tmp_path / "site")
    graph = content("graph-lowered", found.path)
    assert content("site", found.path)["title"] == HOSTILE[0]
    labels = {group["label"] for group in graph["groups"]}
    assert set(HOSTILE) <= labels
    assert {f"odd.{name}" for name in HOSTILE} <= set(column(graph, "module_s"))
    slots: Any = content("slots", found.path)["prefix"]
    assert {f"odd.{name}.weight" for name in HOSTILE} <= {slot["parameter"] for slot in slots}


def test_site_says_what_there_is() -> None:
    found = content("site")
    assert found["stages"] == list(STAGES) and found["default_stage"] == "lowered"
    assert found["views"] == {
        "graph": True,
        "slots": True,
        "cost": True,
        "run": {"available": True, "reason": None},
    }
    assert found["steps"] == 1 and found["format"] == 1
    assert (site().path / "index.html").is_file()
    assert site().files == sum(file.is_file() for file in site().path.rglob("*"))
    assert site().bytes <= sum(f.stat().st_size for f in site().path.rglob("*") if f.is_file())


@pytest.mark.parametrize("backend", ["fused", "transformer"])
def test_stages_of_each_back_end(backend: str, tmp_path: Path) -> None:
    """The transformer runs the lowered graph as it is; every module of it has a phase."""
    simulator = tintc.compile(nano(), SimulatorConfig.paper(inner_lr=0.01), backend=backend)
    found = write_site(simulator, tmp_path / "site")
    expected = [s for s in STAGES if s != "optimized" or backend == "fused"]
    assert content("site", found.path)["stages"] == expected
    graph = content("graph-emitted", found.path)
    operators = zip(column(graph, "operator_s"), column(graph, "phase_s"), strict=True)
    assert backend == "fused" or ("LinearForward", "forward") in set(operators)
