"""Exported models compute what their simulators compute, in onnxruntime, from standard operators
alone.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.support.families import FAMILIES, VOCAB
from tests.support.models import simulate, tokens
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import ONNX, error, measured
from tintc import export_onnx
from tintc.compiler.onnx import Exported, comparison
from tintc.compiler.onnx.files import data_file
from tintc.compiler.onnx.graph import Graph
from tintc.compiler.onnx.operators import OPERATORS
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError, UnsupportedModelError, UsageError
from tintc.ir.ops import OPERATORS as TINT
from tintc.runtime.simulator import Simulator

BACKENDS = ("fused", "transformer")
DEFAULT = (
    "opt",
    "gpt2",
    "llama",
    "gemma",
    "mpt",
)  # on the transformer back end; the others are slow tests


@cache
def simulator(
    name: str = "opt",
    backend: str = "fused",
    preset: str = "paper",
    steps: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Any:
    config = SimulatorConfig.preset(preset, inner_lr=0.002, steps=steps)
    return simulate(FAMILIES[name].build(dtype), config, backend=backend)


def exported(
    sim: Simulator, folder: Path, **options: Any
) -> tuple[Exported, onnxruntime.InferenceSession]:
    done: Exported = export_onnx(sim, folder / "model.onnx", **options)
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    return done, onnxruntime.InferenceSession(str(done.path), quiet)


def run(
    session: onnxruntime.InferenceSession, inputs: dict[str, Tensor], rate: float = 0.002
) -> dict[str, Tensor]:
    types = {value.name: value.type for value in session.get_inputs()}
    feed = {name: value.to(torch.int64).numpy() for name, value in inputs.items()}
    feed["inner_lr"] = np.array(rate, np.float64 if "double" in types["inner_lr"] else np.float32)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, feed)), strict=True))


def expected(sim: Simulator, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.inference_mode():
        return sim(**inputs, **options).logits


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max())


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(
            backend,
            name,
            marks=[pytest.mark.slow] if backend == "transformer" and name not in DEFAULT else [],
        )
        for backend in BACKENDS
        for name in FAMILIES
    ],
)
def test_families(name: str, backend: str, tmp_path: Path) -> None:
    """Batch and length are others than any of the check's."""
    for preset, steps in (("exact", 2),) if backend == "fused" else (("paper", 1),):
        sim = simulator(name, backend, preset, steps)
        done, session = exported(sim, tmp_path)
        assert done.check is not None
        assert done.check.agrees
        for batch, length in ((1, 3), (4, 11)):
            inputs = SCENARIOS["ragged"](batch, length, VOCAB)
            found = measured(
                f"ONNX against torch, {backend}, float32: logits",
                distance(run(session, inputs)["logits"], expected(sim, inputs)),
            )
            assert found < ONNX[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("preset", "steps"), [("paper", 2), ("exact", 1)])
@pytest.mark.slow
def test_presets_and_steps(preset: str, steps: int, backend: str, tmp_path: Path) -> None:
    exported(simulator("gpt2" if backend == "fused" else "opt", backend, preset, steps), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss_gradient", ["mean_embedding", "quadratic"])
def test_loss_gradients(loss_gradient: str, tmp_path: Path) -> None:
    for backend in BACKENDS:
        config = SimulatorConfig.paper(
            inner_lr=0.002, loss_gradient=loss_gradient, norm_update="all", layers=1
        )
        exported(
            simulate(FAMILIES["opt"].build(torch.float32), config, backend=backend),
            tmp_path,
            force=True,
        )


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("fused", name) for name in SCENARIOS),
        *(("transformer", name) for name in ("loss_mask", "demonstrations", "padded_both")),
    ],
)
def test_inputs(name: str, backend: str, tmp_path: Path) -> None:
    """Padding, masks of pairs, positions that restart, narrowed losses."""
    sim, inputs = simulator("llama", backend), SCENARIOS[name](3, 12, VOCAB)
    asked = set(inputs) - {"input_ids", "train_mask"}
    if "attention_mask" in asked and inputs["attention_mask"].ndim == 3:
        asked = asked - {"attention_mask"} | {"pair_mask"}
    _, session = exported(sim, tmp_path, inputs=sorted(asked), check=False)
    assert distance(run(session, inputs)["logits"], expected(sim, inputs)) < ONNX[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*no training target")
@pytest.mark.slow
def test_rate_segment_and_batch_of_a_call(backend: str, tmp_path: Path) -> None:
    """The learning rate is an input; so is, through the mask, how much is trained: nothing, one
    target or everything, of two tokens too.
    """
    sim = simulator("opt", backend)
    _, session = exported(sim, tmp_path, check=False)
    ids = tokens(1, 9, VOCAB)
    for trained in (2, 9, 1, 0):
        inputs = {"input_ids": ids, "train_mask": (torch.arange(9) < trained).long()[None]}
        assert distance(run(session, inputs)["logits"], expected(sim, inputs)) < ONNX[torch.float32]
    inputs["train_mask"] = (torch.arange(9) < 5).long()[None]
    two = {"input_ids": ids[:, :2], "train_mask": torch.ones(1, 2, dtype=torch.int64)}
    assert distance(run(session, two)["logits"], expected(sim, two)) < ONNX[torch.float32]
    plain = run(session, inputs, rate=0.0)["logits"]
    assert distance(plain, sim.predict_initial(ids).detach()) < ONNX[torch.float32]
    other = run(session, inputs, rate=0.02)["logits"]
    assert distance(other, plain) > 1e-3
    sim.inner_lr.data.fill_(0.02)
    try:
        assert distance(other, expected(sim, inputs)) < 10 * ONNX[torch.float32]
    finally:
        sim.inner_lr.data.fill_(0.002)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs(backend: str, tmp_path: Path) -> None:
    sim, inputs = simulator("gpt2", backend), SCENARIOS["padded_left"](3, 12, VOCAB)
    labels = torch.where(torch.arange(12) % 3 == 1, -100, inputs["input_ids"])
    wanted = ("logits", "initial_logits", "losses", "initial_losses")
    done, session = exported(sim, tmp_path, inputs=("attention_mask",), outputs=wanted)
    assert done.outputs == wanted
    found = run(session, {**inputs, "labels": labels})
    with torch.inference_mode():
        out, losses = (
            sim(**inputs, return_initial=True),
            sim.losses(**inputs, labels=labels, return_initial=True),
        )
    for name, value in (
        ("logits", out.logits),
        ("initial_logits", out.initial_logits),
        ("losses", losses.losses),
    ):
        assert distance(found[name], value) < ONNX[torch.float32], name
    assert distance(found["initial_losses"], losses.initial_losses) < ONNX[torch.float32]
    _, session = exported(
        sim, tmp_path, outputs=("losses",), inputs=("attention_mask",), force=True, check=False
    )
    assert (
        distance(run(session, {**inputs, "labels": labels})["losses"], losses.losses)
        < ONNX[torch.float32]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["opt", "mpt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.slow
def test_other_types(dtype: torch.dtype, name: str, backend: str, tmp_path: Path) -> None:
    """GELU of float64 is spelled out, since onnxruntime has no kernel for erf; float16 is compared
    with float32.
    """
    sim = simulator(name, backend, dtype=dtype)
    done, session = exported(sim, tmp_path)
    assert done.check is not None
    assert (
        measured(f"ONNX against torch, {dtype}: logits", done.check.outputs["logits"].error)
        < ONNX[dtype]
    )
    inputs = SCENARIOS["ragged"](2, 8, VOCAB)
    assert run(session, inputs)["logits"].dtype == dtype
    assert error(run(session, inputs)["logits"], expected(sim, inputs)) < ONNX[dtype]


@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    done, _ = exported(simulator("gpt_neo"), tmp_path, opset=opset)
    model = onnx.load(done.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert ("Gelu" in {node.op_type for node in model.graph.node}) == (opset >= 20)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_file(backend: str, optimize: bool, tmp_path: Path) -> None:
    """Standard operators, names that tell where a node comes from, metadata, dynamic sizes, each
    weight once.
    """
    sim = simulator("opt", backend)
    done, _ = exported(sim, tmp_path, optimize=optimize)
    model = onnx.load(done.path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not {"If", "Loop", "Scan", "SequenceMap"} & {node.op_type for node in model.graph.node}
    assert [value.name for value in model.graph.input] == ["input_ids", "train_mask", "inner_lr"]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {name: ["batch", "sequence"] for name in ("input_ids", "train_mask")} | {
        "inner_lr": [],
        "logits": ["batch", "sequence", VOCAB],
    }
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    kind = "linear_backward" if backend == "fused" else "LinearBackward"
    assert any(name.startswith(f"model.decoder.layers.1.fc1/backward_0/{kind}/") for name in names)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert {
        "tintc.version",
        "tintc.config",
        "tintc.source",
        "tintc.backend",
        "tintc.inner_lr",
        "tintc.max_tokens",
    } <= set(about)
    assert (about["tintc.backend"], about["tintc.inner_lr"]) == (backend, "0.002")
    assert "tokenizer.json" not in about
    if optimize:
        return  # folding gives constants of its own
    numbers = [
        onnx.numpy_helper.to_array(tensor).tobytes()
        for tensor in model.graph.initializer
        if np.prod(tensor.dims) > 64
    ]
    assert len(set(numbers)) == len(numbers)
    weights = sum(tensor.numel() for tensor in sim.prefix.tensors().values()) * 4
    if backend == "fused":
        assert done.weight_bytes <= 1.1 * weights


def test_names_of_tied_and_split_weights(tmp_path: Path) -> None:
    done, _ = exported(simulator("gpt2"), tmp_path, check=False)
    names = {tensor.name for tensor in onnx.load(done.path).graph.initializer}
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert len([name for name in names if "h.0.attn.c_attn.weight" in name]) == 3


def test_updates_stay_factors_only_where_the_simulator_s_may(tmp_path: Path) -> None:
    sim = simulate(FAMILIES["opt"].build(torch.float32), SimulatorConfig.paper(inner_lr=0.002))
    sim.optimizations = False
    done, _ = exported(sim, tmp_path)
    assert not any("/low_rank/" in node.name for node in onnx.load(done.path).graph.node)


class TestFiles:
    def test_external_data(self, tmp_path: Path) -> None:
        sim = simulator("llama")
        done, session = exported(sim, tmp_path, external_data=True)
        assert done.data == tmp_path / "model.onnx.data"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
        inputs = SCENARIOS["ragged"](2, 8, VOCAB)
        assert distance(run(session, inputs)["logits"], expected(sim, inputs)) < ONNX[torch.float32]
        assert {
            tensor.data_location
            for tensor in onnx.load(done.path, load_external_data=False).graph.initializer
        } == {0, 1}
        again, _ = exported(sim, tmp_path, force=True, check=False)
        assert again.data is None
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]

    @pytest.mark.slow
    def test_above_the_largest_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tintc.compiler.onnx.LARGEST", 1000)
        assert exported(simulator("llama"), tmp_path)[0].data == tmp_path / "model.onnx.data"

    def test_what_is_there_stays(self, tmp_path: Path) -> None:
        sim = simulator("opt")
        for name in ("model.onnx", "other.onnx.data"):
            (tmp_path / name).write_text("mine")
            with pytest.raises(UsageError, match="exists; pass force=True"):
                export_onnx(sim, tmp_path / name.removesuffix(".data"))
            assert (tmp_path / name).read_text() == "mine"
        with pytest.raises(UsageError, match=r"ends in \.onnx"):
            export_onnx(sim, tmp_path / "model")
        (tmp_path / "folder.onnx").mkdir()
        with pytest.raises(UsageError, match="no file"):
            export_onnx(sim, tmp_path / "folder.onnx", force=True)
        assert data_file(tmp_path / "model.onnx").name == "model.onnx.data"

    def test_a_failed_check_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(comparison, "TOLERANCE", {torch.float32: 0.0})
        (tmp_path / "model.onnx").write_text("before")
        with pytest.raises(
            NumericalError, match="onnxruntime disagrees with the simulator: logits by"
        ):
            export_onnx(simulator("opt"), tmp_path / "model.onnx", force=True)
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
        assert (tmp_path / "model.onnx").read_text() == "before"


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path: Path) -> Any:
        yield
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_an_operator_without_a_standard_form(
        self, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(OPERATORS, "softmax")
        with pytest.raises(
            UnsupportedModelError,
            match=r"(self_attn|lm_head)\S*/\w+_0/\S+ needs torch.softmax, which has no form",
        ):
            export_onnx(simulator("opt", backend), tmp_path / "model.onnx")

    def test_an_operator_that_only_torch_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        object.__setattr__(TINT["residual"], "whole", True)
        try:
            with pytest.raises(
                UnsupportedModelError, match=r"is tint\.residual, which only torch runs"
            ):
                export_onnx(simulator("opt"), tmp_path / "model.onnx")
        finally:
            object.__setattr__(TINT["residual"], "whole", False)

    def test_a_custom_operator(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def custom(graph: Graph, x: Any) -> Any:
            found = graph.add("FastRelu", [x], x.dims, x.dtype)
            graph.nodes[-1].domain = "com.example"
            return found

        monkeypatch.setitem(OPERATORS, "relu", custom)
        with pytest.raises(UnsupportedModelError, match="would need FastRelu"):
            export_onnx(simulator("opt"), tmp_path / "model.onnx")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"inputs": ("labels",)}, "there is no input labels; expected some of loss_mask"),
            ({"inputs": ("attention_mask", "pair_mask")}, "two shapes of one input"),
            ({"outputs": ()}, "outputs are none"),
            ({"outputs": ("updates",)}, "outputs are updates; expected some of logits"),
            ({"opset": 17}, "opset is 17; expected one of 18 to 23"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=message):
            export_onnx(simulator("opt"), tmp_path / "model.onnx", **options)

    def test_bfloat16(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="compute in float32, float64 or float16"):
            export_onnx(simulator("opt", dtype=torch.bfloat16), tmp_path / "model.onnx")
