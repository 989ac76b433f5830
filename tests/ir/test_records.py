"""graph.json: a lowered graph, to records, to JSON and back, is the same program."""

import json
from typing import Any

import pytest

from tests.support.stages import Stage, flat, numbers, printed, stage
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig
from tintc.ir.contracts import check_property
from tintc.ir.errors import ArtifactError
from tintc.ir.node_meta import info
from tintc.ir.records import from_records, to_records
from tintc.passes.place.verify import LOWERED


def as_json(at: Stage) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        json.dumps([record.to_dict() for record in to_records(at.graph)])
    )
    return found


@pytest.fixture
def lowered() -> Stage:
    return stage("verify", SimulatorConfig.exact(inner_lr=0.01, steps=2))


def test_round_trip_prints_and_computes_the_same(lowered: Stage) -> None:
    again = Stage(from_records(as_json(lowered)), lowered.context)
    assert printed(again.graph) == printed(lowered.graph)
    expected, found = flat(numbers(lowered)), flat(numbers(again))
    assert set(found) == set(expected)
    assert all(error(found[name], expected[name]) == 0 for name in expected)


def test_round_trip_keeps_the_records_and_the_contracts(lowered: Stage) -> None:
    """Also step 0 and other values that Python holds for false."""
    again = from_records(as_json(lowered))
    for old, new in zip(lowered.graph.nodes, again.nodes, strict=True):
        for field in (
            "shape",
            "dtype",
            "module",
            "source",
            "role",
            "parameter",
            "slot",
            "trainable",
            "phase",
            "step",
        ):
            assert getattr(info(new), field) == getattr(info(old), field), f"{field} of {old.name}"
    for name in LOWERED:
        assert check_property(name, again, lowered.context) == [], name


@pytest.mark.parametrize("name", [None, "canonicalize", "refuse_unsupported"])
def test_earlier_stages_can_be_printed(name: str | None) -> None:
    records = to_records(stage(name).graph)
    json.dumps([record.to_dict() for record in records])
    assert [record.kind for record in records].count("output") == 1
    known = {record.name for record in records}
    assert all(set(record.inputs()) <= known for record in records)


def test_inputs_lists_each_node_once(lowered: Stage) -> None:
    for record, node in zip(to_records(lowered.graph), lowered.graph.nodes, strict=True):
        assert record.inputs() == [n.name for n in node.all_input_nodes]


def spoil(records: list[dict[str, Any]], name: str, **changes: Any) -> list[dict[str, Any]]:
    return [{**record, **changes} if record["name"] == name else record for record in records]


@pytest.mark.parametrize(
    "operator",
    ["aten.add.Tensor", "os.system", "tint.exec", "builtins.eval", "tint", "", "operator.add"],
)
def test_an_operator_outside_the_dialect_is_refused(lowered: Stage, operator: str) -> None:
    with pytest.raises(ArtifactError, match="not in the tint dialect"):
        from_records(spoil(as_json(lowered), "blocks_0_residual", operator=operator))


BAD: dict[str, dict[str, Any]] = {
    "unknown node": {"args": [{"node": "nowhere"}, {"node": "tokens"}]},
    "no form": {"args": [{"repr": "device(type='cpu')"}, {"node": "tokens"}]},
    "unknown field": {"info": {"evil": 1}},
    "later node": {"args": [{"node": "logits"}, {"node": "tokens"}]},
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_records_are_refused(lowered: Stage, name: str) -> None:
    with pytest.raises(ArtifactError, match=r"graph\.json"):
        from_records(spoil(as_json(lowered), "blocks_0_residual", **BAD[name]))


@pytest.mark.parametrize("missing", ["name", "kind", "operator", "args", "shape", "info"])
def test_a_missing_field_is_refused(lowered: Stage, missing: str) -> None:
    records = [
        {key: value for key, value in record.items() if key != missing}
        for record in as_json(lowered)
    ]
    with pytest.raises(ArtifactError, match=r"graph\.json is malformed"):
        from_records(records)
