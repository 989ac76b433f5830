"""What is done with simulators that hold islands: saved, streamed, adapted, generated from; and
what is refused of them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tintc
from tests.compiler.test_islands import V, decoder
from tests.support.tolerances import OPTIMIZED, SIMULATOR, error
from tintc.compiler.reports.islands import islands, said
from tintc.compiler.verification import verify
from tintc.ir.errors import InputError, UnsupportedModelError, UsageError
from tintc.ir.island import read

LIMIT = SIMULATOR[torch.float64]
CONFIG = tintc.SimulatorConfig.exact(inner_lr=0.05, steps=2)


@pytest.fixture(scope="module")
def by_token() -> tintc.Simulator:
    return tintc.compile(decoder("feed", "mish"), CONFIG)


@pytest.fixture(scope="module")
def ordered() -> tintc.Simulator:
    return tintc.compile(decoder("attend", "sink"), CONFIG)


def texts(batch: int = 3, tokens: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return ids, (torch.arange(tokens) < 6).long().expand(batch, -1)


@pytest.mark.parametrize("kind", ["by_token", "ordered"])
def test_saved_and_loaded(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    simulator = request.getfixturevalue(kind)
    tintc.save(simulator, tmp_path / "sim")
    loaded = tintc.load(tmp_path / "sim")
    with torch.inference_mode():
        assert torch.equal(loaded(*texts()).logits, simulator(*texts()).logits)


def test_an_artifact_runs_nothing_but_listed_operators(
    by_token: tintc.Simulator, tmp_path: Path
) -> None:
    tintc.save(by_token, tmp_path / "sim")
    graph = tmp_path / "sim" / "graph.json"
    text = graph.read_text()
    assert "tanh.default" in text
    for other in ("from_file.default", "rand.default", "empty.memory_format", "add_.Tensor"):
        spoiled = json.loads(text.replace("tanh.default", other))
        with pytest.raises(ValueError, match=f"aten.{other}"):
            read(_program(spoiled))


def _program(graph: dict[str, Any]) -> str:
    record = next(r for r in graph["lowered"] if r["operator"] == "tint.island_forward")
    return str(record["args"][2])


def test_batches_in_slices_give_the_same(by_token: tintc.Simulator) -> None:
    ids, train = texts(batch=40, tokens=20)
    with torch.inference_mode():
        whole = torch.cat([by_token(ids[i : i + 1], train[i : i + 1]).logits for i in range(40)])
        assert error(by_token(ids, train).logits, whole) < OPTIMIZED[torch.float64]


@pytest.mark.parametrize("keys", ["recompute", pytest.param("cache", marks=pytest.mark.slow)])
def test_streams(by_token: tintc.Simulator, ordered: tintc.Simulator, keys: Any) -> None:
    ids, _ = texts(batch=2, tokens=17)
    for simulator in (by_token, ordered):
        if simulator is ordered and keys == "cache":
            with pytest.raises(UsageError, match=r"keys=cache: the island in blocks\.0"):
                simulator.stream(2, 8, 8, keys)
            continue
        plain, batched = [], simulator.stream(2, 8, 8, keys)
        for row in range(2):
            one = simulator.stream(1, 8, 8, keys)
            parts = [one.step(part[row : row + 1]).losses for part in (ids[:, :9], ids[:, 9:])]
            plain.append(torch.cat(parts, 1))
        found = torch.cat([batched.step(part).losses for part in (ids[:, :9], ids[:, 9:])], 1)
        assert error(found[:, 1:], torch.cat(plain)[:, 1:]) < LIMIT


@pytest.mark.slow
def test_generation_recomputes_where_an_island_looks_at_other_tokens(
    by_token: tintc.Simulator, ordered: tintc.Simulator
) -> None:
    ids, train = texts(batch=2)
    for simulator in (by_token, ordered):
        adapted = simulator.adapt(ids, train)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            looks = torch.ones_like(ids)
            found = adapted.generate(ids, attention_mask=looks, max_new_tokens=4, do_sample=False)
        said_so = [w for w in caught if "reads the whole text anew" in str(w.message)]
        assert len(said_so) == (simulator is ordered)
        for b in range(2):
            text = ids[b : b + 1]
            for _ in range(4):
                logits = adapted.select(b)(text).logits
                text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(found[b], text[0])
    with pytest.raises(UsageError, match=r"the island in blocks\.0"):
        ordered.adapt(ids, train)(ids, use_cache=True)


@pytest.mark.slow
def test_masks_of_ones_own_are_refused(ordered: tintc.Simulator) -> None:
    ids, train = texts()
    with pytest.raises(InputError, match="expected a mask of padding"):
        ordered(ids, train, attention_mask=torch.ones(3, 9, 9))
    with pytest.raises(InputError, match="position_ids restart or skip"):
        ordered(ids, train, position_ids=torch.zeros_like(ids))
    ordered(ids, train, position_ids=torch.arange(9).expand(3, -1))


def test_the_transformer_back_end_refuses_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no module for the island blocks_0_island"):
        tintc.compile(decoder("feed", "mish"), CONFIG, backend="transformer", check="none")


def test_the_report_counts_them(by_token: tintc.Simulator) -> None:
    found = islands(by_token)
    assert [kind["count"] for kind in found["kinds"]] == [2]
    assert "aten.tanh" in found["kinds"][0]["operators"]
    assert said(found).startswith(
        "100.0% of the FLOPs in recognised operators, 2 islands: blocks.0"
    )
    assert verify(by_token, tokens=9).islands == ("blocks.0", "blocks.1")


def test_a_paper_simulator_has_exact_gradients_in_islands() -> None:
    """With recognised norms and attention out of the way, paper is exact up to its own rules."""
    model = decoder("feed", "mish")
    config = tintc.SimulatorConfig.paper(inner_lr=0.05)
    assert verify(tintc.compile(model, config), tokens=9).agrees


def test_gradients_from_outside_pass_through(by_token: tintc.Simulator) -> None:
    """The outer gradient of a call, islands' backward passes included, is a finite difference's."""
    ids, train = texts(batch=1)
    name, rate = "blocks.1.up.bias", 1e-5
    weight = by_token.prefix.tensors()[name]
    loss = by_token(ids, train).logits.square().mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight[3] += sign * rate
            values.append(float(by_token(ids, train).logits.square().mean()))
            weight[3] -= sign * rate
    assert abs((values[0] - values[1]) / (2 * rate) - float(gradient[3])) < 1e-7


def test_refused_on_demand() -> None:
    with pytest.raises(UnsupportedModelError, match=r"aten\.mish\.default x2"):
        tintc.compile(decoder("feed", "mish"), CONFIG, islands="refuse")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mish", "by token"])
def test_exported_to_onnx(name: str, tmp_path: Path) -> None:
    """Their nodes are torch.onnx's own; onnxruntime gives the simulator's numbers."""
    config = tintc.SimulatorConfig.exact(inner_lr=0.05)
    exported = tintc.export_onnx(
        tintc.compile(decoder("feed", name), config), tmp_path / "sim.onnx", check=True
    )
    assert exported.check is not None


def test_what_has_no_form_in_onnx_is_refused_before_anything_is_written(
    ordered: tintc.Simulator, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"an island has no form in ONNX.*nothing was"):
        tintc.export_onnx(ordered, tmp_path / "sim.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="a pair caches keys: the island in"):
        tintc.export_onnx_pair(ordered, tmp_path / "pair")
