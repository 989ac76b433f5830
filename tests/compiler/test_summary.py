"""Every figure of the report, counted again from the model, the graph's records or the layout."""

import json
import math
from collections import Counter
from typing import Any

import networkx
import pytest
import torch

import tintc
from tests.support.artifacts import source_directory
from tests.support.models import FAMILIES, gpt2, opt, simulate
from tintc.compiler.cost import estimate
from tintc.compiler.reports.summary import report
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

CONFIGS = [SimulatorConfig.paper(), SimulatorConfig.exact(steps=2, layers=1)]


@pytest.fixture(
    params=[(family, config) for family in FAMILIES for config in CONFIGS],
    ids=lambda p: f"{p[0]}-{p[1].steps}",
)
def case(request: pytest.FixtureRequest) -> tuple[Any, Simulator]:
    family, config = request.param
    model = FAMILIES[family](layers=3, ffn=21, positions=40)
    return model, simulate(model, config)


def test_model(case: tuple[Any, Simulator]) -> None:
    model, simulator = case
    facts = report(simulator)
    assert facts["auxiliary_parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["blocks"] == 3
    assert facts["trained_blocks"] == (simulator.config.layers or 3)
    assert facts["vocab_size"] == 29
    assert facts["max_positions"] == 40
    assert facts["dtype"] == "float64"
    assert facts["config"] == simulator.config.to_dict()


def test_prefix_slots(case: tuple[Any, Simulator]) -> None:
    """One slot for each weight and bias outside the embeddings, three for a product that holds q, k
    and v.
    """
    model, simulator = case
    facts, layout = report(simulator), simulator.program.layout
    slots: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("embed_tokens", "embed_positions", "wte", "wpe")):
            count = 3 if "c_attn" in name else 1
            slots |= {f"{name}:{i}": parameter.numel() // count for i in range(count)}
    assert facts["prefix_slots"] == len(slots)
    assert sum(slot.numbers for slot in layout.prefix.values()) == sum(slots.values())
    tokens_used = {
        (tile.page, j)
        for slot in layout.prefix.values()
        for tile in slot.tiles
        for j in (tile.tokens.start, tile.tokens.stop)
    }
    assert facts["pages"] == 1 + max(page for page, _ in tokens_used)
    assert max(j for _, j in tokens_used) <= facts["prefix_tokens"]
    assert facts["prefix_numbers"] == facts["pages"] * facts["prefix_tokens"] * facts["sim_hidden"]
    assert facts["sim_hidden"] % facts["sim_heads"] == 0


def test_updated_slots(case: tuple[Any, Simulator]) -> None:
    _, simulator = case
    facts = report(simulator)
    ids = torch.arange(6)[None]
    before = simulator.prefix.tensors()
    after = simulator.updated_state_dict(ids, torch.ones_like(ids))
    updates = simulator.updates(ids, torch.ones_like(ids))
    assert facts["updated_slots"] == len(updates)
    assert facts["updated_parameters"] == sum(value[0].numel() for value in updates.values())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # A key's bias may come out unchanged, for its exact gradient is zero, and a fused q, k, v holds
    # three slots.
    assert facts["updated_slots"] >= len(changed) > 0
    assert facts["trainable_slots"] >= facts["updated_slots"]


def test_memory_slots(case: tuple[Any, Simulator]) -> None:
    _, simulator = case
    facts, slots = report(simulator), simulator.program.layout.memory
    assert facts["memory_slots"] == len(slots)
    assert facts["memory_width"] == max(slot.coordinates.stop for slot in slots.values())


@pytest.mark.slow
def test_operators_and_depth(case: tuple[Any, Simulator]) -> None:
    _, simulator = case
    facts, records = report(simulator), simulator.program.stages["lowered"]
    counted = Counter(
        record.operator.removeprefix("tint.")
        for record in records
        if record.operator.startswith("tint.")
    )
    assert facts["operators"] == counted
    assert list(facts["operators"].values()) == sorted(counted.values(), reverse=True)
    graph = networkx.DiGraph()
    for record in records:
        counts = record.operator.startswith("tint.") and record.operator not in (
            "tint.prefix",
            "tint.segment",
            "tint.segment_mask",
        )
        graph.add_edges_from(
            (source, record.name, {"weight": int(counts)}) for source in record.inputs()
        )
    assert facts["depth"] == networkx.dag_longest_path_length(graph)


@pytest.mark.parametrize(
    ("dtype", "positions", "tokens"),
    [(torch.float32, 300, 256), (torch.float64, 17, 17), (torch.bfloat16, 16, 16)],
)
@pytest.mark.slow
def test_estimate(dtype: torch.dtype, positions: int, tokens: int) -> None:
    model = gpt2(dtype=dtype, positions=positions)
    simulator = simulate(model, SimulatorConfig.paper())
    found = report(simulator)["estimate"]
    assert (
        found["weight_bytes"] == sum(p.numel() for p in model.parameters()) * dtype.itemsize + 8
    )  # and the learning rate
    assert (found["batch"], found["tokens"], found["training_segment"]) == (
        1,
        tokens,
        math.ceil(tokens / 2),
    )
    # The last of n trained tokens is a target only, so that n - 1 positions carry loss.
    sizes = {"batch": 1, "tokens": tokens, "segment": math.ceil(tokens / 2) - 1}
    cost = estimate(simulator.program, "fused", dtype, **sizes)
    assert (found["flops"], found["peak_bytes"]) == (
        cost.flops,
        found["weight_bytes"] + cost.peak_bytes,
    )


def test_source_and_json() -> None:
    simulator = tintc.compile(str(source_directory()))
    facts = report(simulator)
    assert facts["source"] == {
        "kind": "directory",
        "name": source_directory().name,
        "revision": None,
        "sha256": simulator.source["sha256"],
    }
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_more_steps_are_deeper() -> None:
    one, three = (report(simulate(opt(), SimulatorConfig.paper(steps=steps))) for steps in (1, 3))
    assert three["depth"] > 2 * one["depth"] - 30
    assert three["operators"]["linear_descent"] == 3 * one["operators"]["linear_descent"]
    assert three["prefix_slots"] == one["prefix_slots"]


@pytest.mark.slow
def test_states_of_the_rule() -> None:
    """One of each kind for every trained weight: of matrices and the rest alike; adam counts."""
    model = opt(layers=3)
    learning = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    learning += sum(p.numel() for n, p in model.named_parameters() if "decoder.final" in n)
    for rule, kinds in (
        ({"momentum": 0.9}, {"momentum"}),
        ({"momentum": 0.9, "optimizer": "muon"}, {"momentum"}),
        ({"optimizer": "adam", "steps": 6}, {"first", "second", "count"}),
        ({"clip_norm": 1.0}, set()),
    ):
        facts = report(simulate(model, SimulatorConfig.exact(**rule)))
        assert set(facts["states"]) == kinds
        for kind, state in facts["states"].items():
            count = kind == "count"
            assert state["numbers"] == (1 if count else learning)
            assert state["slots"] == (1 if count else facts["updated_slots"])


def test_weights_that_max_drift_does_not_limit() -> None:
    """A bias of zeros has no norm to take a part of."""
    model, name = opt(layers=3), "model.decoder.layers.1.fc2.bias"
    with torch.no_grad():
        model.get_parameter(name).zero_()
    for rule, expected in (({"max_drift": 0.1}, [name]), ({}, [])):
        assert report(simulate(model, SimulatorConfig.exact(**rule)))["unlimited"] == expected
