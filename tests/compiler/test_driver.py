"""The driver: from any source to a simulator that was checked against the model, which stays as it
was.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tintc
from tests.support.artifacts import LAYERS, source_directory
from tests.support.models import FAMILIES, gpt2, opt, tokens
from tests.support.tolerances import HALF_LOGITS, error
from tintc.compiler import driver
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError, SourceError, UnsupportedModelError, UsageError


class TestSources:
    def test_module(self) -> None:
        model = opt(dtype=torch.float32)
        simulator = tintc.compile(model, SimulatorConfig.exact(steps=2, layers=1))
        assert isinstance(simulator, tintc.Simulator)
        assert simulator.config == SimulatorConfig.exact(steps=2, layers=1)
        assert simulator.source["kind"] == "module"
        assert simulator.source["name"] == "OPTForCausalLM"
        assert simulator.tokenizer is None
        assert simulator.dtype == torch.float32

    def test_directory(self) -> None:
        simulator = tintc.compile(str(source_directory()))
        assert simulator.config == SimulatorConfig.paper()
        assert simulator.source["kind"] == "directory"
        assert simulator.program.facts.trained_blocks == LAYERS
        assert simulator.tokenizer is not None

    @pytest.mark.slow
    def test_plain_module_that_is_no_transformers_model(self) -> None:
        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = gpt2()

            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                return self.inner(input_ids, use_cache=False).logits

        simulator = tintc.compile(Wrapped())
        assert simulator.source["config"] is None
        assert "inner.transformer.wte.weight" in simulator.prefix.tensors()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype(self, dtype: torch.dtype) -> None:
        simulator = tintc.compile(str(source_directory()), dtype=dtype)
        assert {p.dtype for p in simulator.prefix.parameters()} == {dtype}
        if dtype in HALF_LOGITS:
            exact = tintc.compile(str(source_directory()), dtype=torch.float64)
            ids = tokens(1, 9, 4096)
            assert (
                error(simulator.predict_initial(ids), exact.predict_initial(ids))
                < HALF_LOGITS[dtype]
            )

    def test_module_keeps_its_dtype(self) -> None:
        assert tintc.compile(opt(dtype=torch.float64)).dtype == torch.float64
        with pytest.raises(UsageError, match=r"dtype is torch\.float32"):
            tintc.compile(opt(dtype=torch.float64), dtype=torch.float32)

    def test_seed_of_a_shape(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tintc.compiler.frontend import shapes

        config = {
            "model_type": "opt",
            "vocab_size": 31,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "ffn_dim": 12,
        }
        config |= {"num_hidden_layers": 1, "max_position_embeddings": 20, "word_embed_proj_dim": 8}
        monkeypatch.setattr(shapes, "_shapes", lambda: {"toy": config})
        first, again, other = (
            tintc.compile("shape:toy", seed=seed).prefix.state_dict() for seed in (1, 1, 2)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)

    def test_stages_are_told(self) -> None:
        told: list[str] = []
        tintc.compile(opt(), progress=told.append)
        assert told == ["load", "capture", "lower", "check"]

    def test_passes_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="tintc.passes"):
            tintc.compile(opt())
        assert [r.message.split(":")[0] for r in caplog.records][:2] == [
            "canonicalize",
            "recognize_embedding",
        ]


class TestTheModelStaysAsItWas:
    def test_mode(self) -> None:
        model = opt().train()
        model.model.decoder.layers[0].eval()
        modes = {name: module.training for name, module in model.named_modules()}
        tintc.compile(model)
        assert {name: module.training for name, module in model.named_modules()} == modes

    def test_weights_gradients_and_hooks(self) -> None:
        model = opt()
        model.lm_head.weight.requires_grad_(False)
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        before, grad = copy.deepcopy(model.state_dict()), next(model.parameters()).grad
        needs = {name: p.requires_grad for name, p in model.named_parameters()}
        simulator = tintc.compile(model, SimulatorConfig.exact(inner_lr=0.1))
        simulator(tokens(2, 9, 29), torch.ones(2, 9)).logits.sum().backward()
        torch.optim.SGD(simulator.parameters(), lr=1.0).step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert next(model.parameters()).grad is grad
        assert {name: p.requires_grad for name, p in model.named_parameters()} == needs
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )

    def test_changing_the_model_does_not_change_the_simulator(self) -> None:
        model = opt()
        simulator = tintc.compile(model)
        before = simulator.predict_initial(tokens(1, 9, 29))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(simulator.predict_initial(tokens(1, 9, 29)), before)

    def test_mode_comes_back_after_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = opt().train()
        tamper(monkeypatch)
        with pytest.raises(NumericalError):
            tintc.compile(model)
        assert all(module.training for module in model.modules())

    def test_random_state(self) -> None:
        model = opt()
        state = torch.get_rng_state()
        tintc.compile(model)
        assert torch.equal(torch.get_rng_state(), state)


def tamper(patch: pytest.MonkeyPatch, name: str = "layers.0.fc1.bias", change: float = 0.5) -> None:
    """Makes the driver compile other weights than the model has."""
    capture = driver.capture

    def tampered(model: nn.Module) -> Any:
        captured = capture(model)
        changed = {
            key: value + change if key.endswith(name) else value
            for key, value in captured.tensors.items()
        }
        return type(captured)(captured.graph, changed, captured.aliases, captured.constants)

    patch.setattr(driver, "capture", tampered)


class TestSelfCheck:
    def test_other_weights_are_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tamper(monkeypatch)
        with pytest.raises(
            NumericalError, match="the compiled forward pass differs from the model's by"
        ) as caught:
            tintc.compile(opt())
        assert caught.value.exit_code == 5

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_result_that_is_no_number_is_noticed(
        self, value: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tamper(monkeypatch, change=value)
        with pytest.raises(NumericalError):
            tintc.compile(opt())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_model_of_two_positions(self, family: str) -> None:
        assert tintc.compile(FAMILIES[family](positions=2)).program.facts.max_positions == 2


class TestWhateverTheCallerIsIn:
    """What is compiled or loaded outlives the caller's inference_mode, in which it could be neither
    differentiated nor trained.
    """

    @pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
    def test_compiled_saved_and_loaded(self, around: Any, tmp_path: Path) -> None:
        with around():
            made = opt()  # with weights of that mode
            simulator = tintc.compile(made, check="step")
            tintc.save(simulator, tmp_path / "sim")
            loaded = tintc.load(tmp_path / "sim")
        for each in (simulator, loaded, tintc.compile(made, check="step")):
            assert self.gradient(each) > 0

    def gradient(self, simulator: tintc.Simulator) -> float:
        """The largest of a weight, as outer training asks for."""
        ids = tokens(1, 9, 29)
        leaf = next(iter(simulator.prefix.parameters()))
        logits = simulator(ids, torch.ones_like(ids)).logits
        (found,) = torch.autograd.grad(logits.sum(), leaf)
        return float(found.abs().max())


class TestRefused:
    def test_nan_weights(self) -> None:
        model = opt()
        with torch.no_grad():
            model.model.decoder.layers[1].fc1.weight[0, 0] = float("nan")
        with pytest.raises(
            SourceError, match=r"NaN or infinite weights in model\.decoder\.layers\.1\.fc1\.weight"
        ):
            tintc.compile(model)

    def test_not_a_model(self) -> None:
        with pytest.raises(UsageError, match="source is a int"):
            tintc.compile(3)  # type: ignore[arg-type]

    def test_too_many_layers(self) -> None:
        with pytest.raises(UsageError, match="layers is 3; expected 1 to 2"):
            tintc.compile(opt(layers=2), SimulatorConfig.paper(layers=3))

    def test_not_a_language_model(self) -> None:
        with pytest.raises(UnsupportedModelError):
            tintc.compile(nn.Sequential(nn.Embedding(9, 4), nn.Flatten()))
