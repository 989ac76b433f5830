"""What torch does with any module: autocast, the meta device, TorchScript."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import tintc
from tests.support.models import opt, ragged_train_mask, simulate, tokens
from tests.support.models import simulator_of as shared
from tintc.compiler.verification import verify
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError
from tintc.runtime.simulator import Simulator

IDS, TRAIN = tokens(3, 11, 29), ragged_train_mask(3, 11)
PAPER = SimulatorConfig.paper(inner_lr=0.01)


def float32() -> Simulator:
    return shared(opt(dtype=torch.float32), PAPER)


MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(mode: Any) -> None:
    """In it, the finite differences of the paper would be those of bfloat16 written for float32."""
    with mode():
        expected, expected_updates = float32()(IDS, TRAIN).logits, float32().updates(IDS, TRAIN)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, updates = float32()(IDS, TRAIN).logits, float32().updates(IDS, TRAIN)
            fresh = simulate(opt(dtype=torch.float32), PAPER)(IDS, TRAIN).logits
    assert torch.equal(found, expected)
    assert torch.equal(fresh, expected)
    assert all(torch.equal(updates[slot], value) for slot, value in expected_updates.items())


@pytest.mark.parametrize("backend", ["fused", "transformer"])
def test_on_meta_calls_give_shapes(backend: str) -> None:
    simulator = simulate(opt(), PAPER, backend=backend).to("meta")
    attention = torch.ones_like(IDS)
    attention[0, :3] = 0
    for ids, train in ((IDS, TRAIN), (IDS.to("meta"), TRAIN.to("meta"))):
        out = simulator(ids, train, attention_mask=attention, labels=ids, return_initial=True)
        assert out.logits.is_meta
        assert out.initial_logits is not None
        assert out.loss is not None
        assert (out.logits.shape, out.initial_logits.shape) == ((3, 11, 29), (3, 11, 29))
        assert out.loss.shape == ()
        assert simulator(ids, train, logits_to_keep=2).logits.shape == (3, 2, 29)
        assert simulator.predict_initial(ids).shape == (3, 11, 29)
        assert simulator.losses(ids, train, ids).losses.shape == (3, 11)
        updates = simulator.updates(ids, train)
        assert simulator.predict(updates, ids).shape == (3, 11, 29)
        state = simulator.updated_state_dict(ids, train)
        assert {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in opt().state_dict().items()
        }


def test_what_has_no_numbers_is_not_written(tmp_path: Path) -> None:
    simulator = simulate(opt(), PAPER).to("meta")
    for use in (
        lambda: tintc.save(simulator, tmp_path / "artifact"),
        lambda: tintc.export_onnx(simulator, tmp_path / "model.onnx"),
        lambda: verify(simulator),
    ):
        with pytest.raises(UsageError, match="on the meta device, where weights have no numbers"):
            use()
    assert not list(tmp_path.iterdir())


def test_from_meta_a_simulator_comes_back_with_its_rate() -> None:
    simulator = simulate(opt(), PAPER)
    state = simulator.state_dict()
    empty = simulate(opt(), PAPER).to("meta").to_empty(device="cpu")
    assert float(empty.inner_lr.detach()) == PAPER.inner_lr
    empty.load_state_dict(state)
    assert torch.equal(empty(IDS, TRAIN).logits, simulator(IDS, TRAIN).logits)


@pytest.mark.parametrize(
    "name", ["input_ids", "train_mask", "attention_mask", "position_ids", "labels"]
)
def test_an_input_without_numbers_is_refused(name: str) -> None:
    given = {"input_ids": IDS, "train_mask": TRAIN, name: IDS.to("meta")}
    with pytest.raises(InputError, match=f"{name} is on the meta device.*this simulator is on cpu"):
        float32()(**given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["trace", "script", "onnx"])
def test_torchscript_is_refused_in_one_line(way: str) -> None:
    ways = {
        "trace": lambda: torch.jit.trace(float32(), (IDS, TRAIN)),
        "script": lambda: torch.jit.script(float32()),
        "onnx": lambda: torch.onnx.export(float32(), (IDS, TRAIN), io.BytesIO(), dynamo=False),
    }
    with pytest.raises(
        UsageError, match=r"use torch\.export\.export.*tintc\.export_onnx"
    ) as caught:
        ways[way]()
    assert "\n" not in str(caught.value)


class TestAccelerate:
    """`Accelerator.prepare` takes a simulator with an outer loss as it takes any module."""

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_an_outer_step(self, precision: str) -> None:
        accelerate = pytest.importorskip("accelerate", reason="accelerate is no dependency")
        from accelerate.state import AcceleratorState

        prepared, plain = (simulate(opt(dtype=torch.float32), PAPER) for _ in range(2))
        expected = _outer_step(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        AcceleratorState._reset_state(True)
        try:
            accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
            optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
            model, optimizer = accelerator.prepare(prepared, optimizer)
            found = _outer_step(model, optimizer, accelerator.backward)
            own = accelerator.unwrap_model(model)
        finally:
            AcceleratorState._reset_state(True)
        assert type(own) is Simulator
        assert torch.equal(found, expected), "mixed precision changes no call, as autocast does not"
        for name, value in plain.state_dict().items():
            assert torch.equal(own.state_dict()[name], value)
        assert own.adapt(IDS, TRAIN)(IDS).logits.isfinite().all()


def _outer_step(model: Any, optimizer: Any, backward: Any = torch.Tensor.backward) -> torch.Tensor:
    loss: torch.Tensor = model(IDS, TRAIN, labels=IDS).loss
    backward(loss)
    optimizer.step()
    return loss.detach()
