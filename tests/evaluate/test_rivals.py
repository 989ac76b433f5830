"""What simulators are timed against: each loop against an optimizer on a copy of the model, and
loops on other kernels against themselves in float64.
"""

import builtins
import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.evaluate.test_benchmark import MODELS, RATE, by_optimizer, case
from tests.support.models import gpt2, opt, randomized, simulate
from tintc.compiler.autograd_rule import InnerRule, rule_of
from tintc.compiler.frontend.capture import LogitsOnly
from tintc.evaluate.speed import benchmark
from tintc.evaluate.speed.benchmark import HandWrittenLoop, relative_difference
from tintc.evaluate.speed.exported import OnnxRuntime
from tintc.evaluate.speed.kernels import counted_products, simulator_kernels, use_kernels
from tintc.evaluate.speed.rivals import (
    KINDS,
    RANK,
    CompiledLoop,
    VmapLoop,
    check_rival,
    loop_against,
)
from tintc.evaluate.speed.settings import Against
from tintc.evaluate.speed.workload import random_workload
from tintc.evaluate.speed.workload import simulate as call
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.ops.onednn import available

needs_onednn = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_vmap_equals_an_optimizer(name: str, steps: int) -> None:
    model, simulator, _, work = case(name, SimulatorConfig.exact(steps=steps, inner_lr=RATE))
    names = benchmark.updated_parameters(simulator)
    expected = [by_optimizer(model, names, ids_T, work.trained, steps)[0] for ids_T in work.ids_BT]
    loop = VmapLoop(copy.deepcopy(model), names, rule_of(simulator))
    assert relative_difference(loop(work), expected) < 1e-12
    assert relative_difference(loop(work), loop(work)) == 0  # the weights are as they were


def test_vmap_follows_rates_of_its_own() -> None:
    config = SimulatorConfig.exact(
        steps=2, inner_lr=RATE, schedule=(1.0, 0.25), lr_scale={"*.bias": 0.5}
    )
    model, simulator, loop, work = case("gpt2", config)
    names = benchmark.updated_parameters(simulator)
    found = VmapLoop(copy.deepcopy(model), names, rule_of(simulator))(work)
    assert relative_difference(found, loop(work)) < 1e-12


@pytest.mark.slow  # a minute of C++
def test_compiled_loop_equals_the_loop() -> None:
    model, simulator, loop, work = case("opt", SimulatorConfig.exact(inner_lr=RATE), torch.float32)
    names = benchmark.updated_parameters(simulator)
    found = CompiledLoop(copy.deepcopy(model), names, rule_of(simulator))(work)
    assert relative_difference(found, loop(work)) < 1e-5


@pytest.mark.parametrize("build", [opt, gpt2])
def test_lora_is_peft_and_an_optimizer(build: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = build()
    work = random_workload(29, batch=2, tokens=11, trained=7)
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and "layers.1" in name]
    names = names or [n for n, p in model.named_parameters() if p.ndim == 2 and "h.1." in n]
    layers = [name.rpartition(".")[0] for name in names]
    rule = InnerRule(SimulatorConfig.exact(steps=2, inner_lr=RATE))
    found = loop_against("lora", copy.deepcopy(model), names, rule)(work)
    torch.manual_seed(0)  # as adapters are drawn
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    learn = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    expected = [by_optimizer(adapted, learn, ids_T, 7, 2)[0] for ids_T in work.ids_BT]
    assert len(learn) == 2 * len(layers) > 0
    assert relative_difference(found, expected) < 1e-12
    assert relative_difference(found, LogitsOnly(model)(work.ids_BT).detach()) > 1e-3


def test_lora_needs_a_linear_layer() -> None:
    with pytest.raises(UsageError, match="nothing that is trained is a linear layer"):
        loop_against("lora", opt(), ["model.decoder.embed_tokens.weight"], InnerRule(sgd()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.slow
def test_onnxruntime_runs_the_simulator(dtype: torch.dtype) -> None:
    simulator = simulate(gpt2(dtype=dtype), SimulatorConfig.paper(inner_lr=RATE))
    work = random_workload(29, batch=3, tokens=11, trained=7)
    found = OnnxRuntime.of(simulator)(work)
    assert relative_difference(found, call(simulator, work)) < 1e-4


class OwnLayer(nn.Module):
    """A linear layer of nobody's class, its weight stored as (I, O)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(29, 29))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Own(nn.Module):
    """Two of them behind an embedding, and a matrix that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 29)
        self.first, self.second = OwnLayer(), nn.Linear(29, 29)
        self.tail = nn.Bilinear(29, 29, 29)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(self.embedding(input_ids)))
        logits: torch.Tensor = self.second(x) + self.tail(x, x)
        return logits


def falcon(dtype: torch.dtype) -> nn.Module:
    config = transformers.FalconConfig(
        vocab_size=29, hidden_size=12, num_hidden_layers=2, num_attention_heads=3
    )
    return randomized(transformers.FalconForCausalLM(config), 0).to(dtype)


@needs_onednn
@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (lambda dtype: opt(dtype=dtype), 13),
        (lambda dtype: gpt2(dtype=dtype), 9),
        (falcon, 9),  # its layers are of a class of its own
        (lambda dtype: Own().to(dtype), 2),
    ],
    ids=["opt", "gpt2", "falcon", "own"],
)
def test_same_kernels(build: Any, layers: int) -> None:
    """As many operations, all linear layers on oneDNN, and the numbers of float64."""
    torch.manual_seed(0)
    wide = build(torch.float64).eval()
    model = copy.deepcopy(wide).float()
    names = [
        name for name, p in wide.named_parameters() if "embed" not in name and "wte" not in name
    ]
    rule = InnerRule(SimulatorConfig.exact(steps=2, inner_lr=0.01))
    work = random_workload(29, batch=2, tokens=11, trained=7)
    expected = HandWrittenLoop(wide, names, rule)(work)
    loop = HandWrittenLoop(model, names, rule)
    before = counted_products(lambda: loop(work))
    shapes: set[tuple[int, int, int]] = set()
    assert use_kernels(model, lambda *shape: shapes.add(shape) is None) == layers
    found, after = loop(work), counted_products(lambda: loop(work))
    assert relative_difference(found, expected) < 1e-5
    assert before["all"] == after["all"] > 0
    assert (before["replaced"], after["replaced"]) == (0, before["linear"])
    assert after["linear"] == 0
    assert {rows for rows, *_ in shapes} >= {6, 11}  # the segment, and the whole sequence


@needs_onednn
def test_kernels_may_differ_by_shape() -> None:
    model = opt(dtype=torch.float32)
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    loop = HandWrittenLoop(model, names, InnerRule(sgd()))
    work = random_workload(29, batch=1, tokens=11, trained=7)
    expected = loop(work)
    use_kernels(model, lambda rows, inner, columns: rows == 11)
    counted = counted_products(lambda: loop(work))
    assert counted["replaced"] > 0 < counted["linear"]
    assert relative_difference(loop(work), expected) < 1e-5


def sgd() -> SimulatorConfig:
    return SimulatorConfig.exact(inner_lr=RATE)


def test_which_kernels_a_simulator_has() -> None:
    single, double = (simulate(opt(dtype=d), sgd()) for d in (torch.float32, torch.float64))
    assert simulator_kernels(double) is None
    assert use_kernels(opt(), lambda *_: True) == 0
    chosen = simulator_kernels(single)
    assert (chosen is None) != available()
    single.optimizations = ()
    assert simulator_kernels(single) is None


class TestRefused:
    """Before anything is loaded."""

    @pytest.mark.parametrize(
        ("against", "fields", "words"),
        [
            ("vmap", {"momentum": 0.9, "decay": 0.1}, "got momentum, decay"),
            ("lora", {"lr_scale": {"*.bias": 2.0}}, "against lora has no lr_scale"),
            ("lora", {"optimizer": "rms"}, "against lora has no optimizer rms"),
        ],
    )
    def test_rules(self, against: Against, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            check_rival(against, SimulatorConfig.exact(**fields), "cpu")

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import config

        monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
        with pytest.raises(UsageError, match=r"needs a C\+\+ compiler on a CPU, and none"):
            check_rival("compile", sgd(), "cpu")
        check_rival("compile", sgd(), "cuda")

    def test_no_peft(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load = builtins.__import__

        def without(name: str, *more: Any) -> Any:
            if name == "peft":
                raise ImportError
            return load(name, *more)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(UsageError, match="needs the package peft"):
            check_rival("lora", sgd(), "cpu")

    def test_onnxruntime_on_a_gpu(self) -> None:
        with pytest.raises(UsageError, match="runs on a CPU; got device cuda"):
            check_rival("onnxruntime", sgd(), "cuda")

    def test_every_kind_is_known(self) -> None:
        from typing import get_args

        assert tuple(KINDS) == get_args(Against)
