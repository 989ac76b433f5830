"""Exported inner rules compute, in float32 in onnxruntime, what torch.optim and the formulas of
TINT.md section 7 give in float64 (tests/oracle/rules.py): unrolled steps, and more of them in a
Loop.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from tests.compiler.test_onnx import distance, expected, exported, run, simulator
from tests.oracle.reference import Reference, reference
from tests.support.families import FAMILIES, VOCAB
from tests.support.models import simulate
from tests.support.once import capture_once, lower_once
from tests.support.rules import ALONE, RATE
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import ONNX, measured
from tintc import export_onnx
from tintc.compiler.casts import no_casts
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.inputs import statistics_name
from tintc.runtime.simulator import Simulator

LIMIT = ONNX[torch.float32]
EVERYTHING = {"train": ("*",)}  # embeddings and the head too
COMBINED: dict[str, tuple[str, dict[str, Any]]] = {
    "tied head, momentum": ("opt", {**EVERYTHING, "momentum": 0.9}),
    "head of its own, clipped": ("llama", {**EVERYTHING, "clip_norm": 0.5, "momentum": 0.9}),
    "embeddings, adam": ("gpt2", {"train": ("*wte*", "*.1.*"), "optimizer": "adam"}),
    "embeddings alone": ("opt", {"train": ("*embed*",), "decay": 0.1}),
    "all at once": (
        "gpt2",
        {"momentum": 0.9, "nesterov": True, "normalize": "weight", "decay": 0.1,
         "max_drift": 0.002, "schedule": "cosine", "lr_scale": {"*.0.*": 0.5}},
    ),
}  # fmt: skip
LOOPED = ("momentum", "linear", "clip", "normalize", "drift", "adam", "muon with momentum")
SIZES = ((1, 3), (4, 11))


def made(name: str, **fields: Any) -> tuple[Simulator, Any]:
    """A simulator in float32, and the same model in float64."""
    model = FAMILIES[name].build(torch.float32)
    config = SimulatorConfig.exact(**{"inner_lr": RATE, **fields})
    return simulate(model, config), copy.deepcopy(model).double()


def wanted(sim: Simulator, model: Any, inputs: dict[str, Tensor], **rms: Any) -> Reference:
    with no_casts():
        return reference(model, sim.config, **inputs, trained=updated_parameters(sim), **rms)


def assert_follows(
    folder: Path, sim: Simulator, model: Any, sizes: tuple[tuple[int, int], ...] = SIZES, **rms: Any
) -> onnx.ModelProto:
    """Of other batches and lengths than the export's check has."""
    done, session = exported(sim, folder)
    assert done.check is not None
    assert done.check.agrees
    for batch, length in sizes:
        inputs = SCENARIOS["ragged"](batch, length, VOCAB)
        logits = run(session, inputs, rate=sim.config.inner_lr)["logits"]
        kind = "ONNX against torch.optim, float32: logits"
        off = measured(kind, distance(logits, wanted(sim, model, inputs, **rms).logits))
        assert off < LIMIT
    return onnx.load(done.path)


def loops(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Loop"]


@pytest.mark.parametrize("rule", ALONE)
def test_alone(rule: str, tmp_path: Path) -> None:
    model = assert_follows(tmp_path, *made("opt", steps=2, **ALONE[rule]))
    assert not loops(model)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", COMBINED)
def test_combined(case: str, steps: int, tmp_path: Path) -> None:
    name, rule = COMBINED[case]
    assert_follows(tmp_path, *made(name, steps=steps, **rule))


@pytest.mark.parametrize("steps", [2, 5])
def test_root_mean_squares(steps: int, tmp_path: Path) -> None:
    """The file holds the statistics that gradients are divided by."""
    model = FAMILIES["opt"].build(torch.float32)
    config = SimulatorConfig.exact(inner_lr=RATE, steps=steps, optimizer="rms")
    captured = capture_once(model)
    program, generator = lower_once(captured, config), torch.Generator().manual_seed(0)
    rms = {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64) + 0.5
        for name, weight in model.named_parameters()
    }
    statistics = {statistics_name(name): value.float() for name, value in rms.items()}
    sim = Simulator(program, {**captured.tensors, **statistics})
    assert_follows(tmp_path, sim, copy.deepcopy(model).double(), rms=rms)


@pytest.mark.parametrize("steps", [6, 9])
@pytest.mark.parametrize("rule", LOOPED)
def test_looped(rule: str, steps: int, tmp_path: Path) -> None:
    model = assert_follows(tmp_path, *made("opt", steps=steps, **ALONE[rule]))
    assert len(loops(model)) == 1


@pytest.mark.parametrize("case", COMBINED)
@pytest.mark.slow
def test_looped_and_combined(case: str, tmp_path: Path) -> None:
    name, rule = COMBINED[case]
    assert_follows(tmp_path, *made(name, steps=5, **rule), sizes=((3, 9),))


@pytest.mark.slow
def test_without_a_rule(tmp_path: Path) -> None:
    """By the paper's approximations, and with factors of a schedule, one of them negative."""
    factors = (1.0, 0.5, 0.0, -0.5, 2.0, 1.0, 0.25)
    assert_follows(tmp_path, *made("opt", steps=7, schedule=factors))
    sim = simulator("opt", "fused", "paper", 6)
    _, session = exported(sim, tmp_path, force=True)
    inputs = SCENARIOS["ragged"](4, 11, VOCAB)
    assert distance(run(session, inputs)["logits"], expected(sim, inputs)) < LIMIT


@pytest.mark.parametrize("name", ["loss_mask", "position_ids", "padded_left"])
def test_inputs_and_outputs(name: str, tmp_path: Path) -> None:
    sim, _ = made("llama", steps=6, momentum=0.5, layers=1)
    inputs = SCENARIOS[name](3, 12, VOCAB)
    labels = torch.where(torch.arange(12) % 3 == 1, -100, inputs["input_ids"])
    asked = sorted(set(inputs) - {"input_ids", "train_mask"})
    kinds = ("logits", "initial_logits", "losses", "initial_losses")
    _, session = exported(sim, tmp_path, inputs=asked, outputs=kinds)
    found = run(session, {**inputs, "labels": labels})
    with torch.inference_mode():
        out = sim(**inputs, return_initial=True)
        losses = sim.losses(**inputs, labels=labels, return_initial=True)
    values = (out.logits, out.initial_logits, losses.losses, losses.initial_losses)
    for kind, value in zip(kinds, values, strict=True):
        assert value is not None
        assert distance(found[kind], value) < LIMIT, kind


@pytest.mark.filterwarnings("ignore:.*no training target")
def test_rate_and_segment_of_a_call(tmp_path: Path) -> None:
    """Both are inputs of every step."""
    sim, _ = made("opt", steps=6, optimizer="adam")
    _, session = exported(sim, tmp_path, check=False)
    inputs = SCENARIOS["ragged"](2, 9, VOCAB)
    plain = run(session, inputs, rate=0.0)["logits"]
    assert distance(plain, sim.predict_initial(inputs["input_ids"]).detach()) < LIMIT
    assert distance(run(session, inputs, rate=RATE)["logits"], plain) > 1e-3
    for trained in (9, 1, 0):
        inputs["train_mask"] = (torch.arange(9) < trained).long().expand(2, 9)
        found = run(session, inputs, rate=RATE)["logits"]
        assert distance(found, expected(sim, inputs)) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.slow
def test_other_types(steps: int, dtype: torch.dtype, tmp_path: Path) -> None:
    rule: dict[str, Any] = {"momentum": 0.9, "clip_norm": 0.5, "decay": 0.1, "schedule": "linear"}
    config = SimulatorConfig.exact(inner_lr=RATE, steps=steps, **rule)
    done, _ = exported(simulate(FAMILIES["opt"].build(dtype), config), tmp_path)
    assert done.check is not None
    assert done.check.outputs["logits"].error < ONNX[dtype]


def test_the_file_does_not_grow_with_steps(tmp_path: Path) -> None:
    """But for one factor of the schedule a step."""
    rule: dict[str, Any] = {"momentum": 0.9, "clip_norm": 0.5, "schedule": "linear"}
    few, many = (
        exported(made("opt", steps=steps, **rule)[0], tmp_path, force=True, check=False)[0]
        for steps in (5, 205)
    )
    assert few.nodes == many.nodes
    assert 0 <= many.file_bytes - few.file_bytes < 200 * 4 + 200


def test_the_loop_holds_what_differs_from_step_to_step(tmp_path: Path) -> None:
    """Frozen blocks, embeddings and masks run once, in front of it; it is a standard operator."""
    sim, _ = made("opt", steps=6, layers=1, momentum=0.9)
    done, _ = exported(sim, tmp_path)
    model = onnx.load(done.path)
    (loop,) = loops(model)
    assert {node.domain for node in model.graph.node} == {""}
    body = [node.name for node in loop.attribute[0].g.node]
    before = [node.name for node in model.graph.node]
    assert len({*body, *before}) == len(body) + len(before)
    assert any(name.startswith("model.decoder.layers.1.fc1/") for name in body)
    assert not any(name.startswith("model.decoder.layers.0.") for name in body)
    products = ("Gemm", "MatMul")
    lower = [n for n in before if "layers.0.fc1/forward_0" in n and n.split("/")[-1] in products]
    assert len(lower) == 1


@pytest.mark.slow
def test_optimized(tmp_path: Path) -> None:
    sim, _ = made("opt", steps=6, momentum=0.9)
    done, _ = exported(sim, tmp_path, optimize=True, external_data=True)
    assert done.check is not None
    assert done.check.agrees


def test_a_loop_on_the_transformer_back_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"6 steps are a loop.*at most 4 steps, or back"
    ):
        export_onnx(simulator("opt", "transformer", "paper", 6), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
