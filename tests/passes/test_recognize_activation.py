import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import gpt2
from tests.passes.stages import assert_golden, assert_same_numbers, printed, stage
from tests.passes.toys import Toy, toy
from tintc.compiler.dialect import argument, is_tint


def written_out(x: Tensor, half: float = 0.5, cubic: float = 0.044715, scale: float = math.sqrt(2 / math.pi)) -> Tensor:
    return half * x * (1.0 + torch.tanh(scale * (x + cubic * torch.pow(x, 3.0))))


FORMS = {
    "relu": (lambda m, x, ids: torch.relu(m.linear(x)), "relu"),
    "relu in place": (lambda m, x, ids: F.relu_(m.linear(x)), "relu"),
    "gelu": (lambda m, x, ids: F.gelu(x), "gelu"),
    "gelu tanh": (lambda m, x, ids: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "silu": (lambda m, x, ids: F.silu(x), "silu"),
    "tanh": (lambda m, x, ids: torch.tanh(x), "tanh"),
    "gelu written out": (lambda m, x, ids: written_out(m.linear(x)), "gelu_tanh"),
}


@pytest.mark.parametrize("name", FORMS)
def test_fires(name: str) -> None:
    middle, kind = FORMS[name]
    model = toy(middle)
    found = stage("recognize_activation", model=model)
    kinds = [argument(node, "kind") for node in found.graph.nodes if is_tint(node, "activation_forward")]
    assert kinds == [kind]
    assert not {op for op in found.operators() if any(part in op for part in ("relu", "gelu", "silu", "tanh.", "pow"))}
    assert_same_numbers("recognize_activation", model=model)


NEARLY = {
    "another cubic": lambda m, x, ids: written_out(x, cubic=0.05),
    "another half": lambda m, x, ids: written_out(x, half=0.4),
    "another scale": lambda m, x, ids: written_out(x, scale=0.9),
    "two inputs": lambda m, x, ids: 0.5 * m.linear(x) * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "power of another": lambda m, x, ids: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * m.linear(x) ** 3))),
}


@pytest.mark.parametrize("name", NEARLY)
def test_nearly_a_gelu_is_none(name: str) -> None:
    model = toy(NEARLY[name])
    kinds = [argument(n, "kind") for n in stage("recognize_activation", model=model).graph.nodes if is_tint(n, "activation_forward")]
    assert kinds == ["tanh"]
    assert_same_numbers("recognize_activation", model=model)


@pytest.mark.parametrize("function", [torch.sigmoid, torch.exp, F.leaky_relu, F.elu, torch.relu6 if hasattr(torch, "relu6") else F.relu6])
def test_leaves_others_alone(function) -> None:  # type: ignore[no-untyped-def]
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        return function(m.linear(x))

    model = toy(middle)
    assert printed(stage("recognize_activation", model=model).graph) == printed(stage("canonicalize", model=model).graph)


def test_keeps_the_numbers_of_models() -> None:
    assert_same_numbers("recognize_activation")
    assert_same_numbers("recognize_activation", model=gpt2(vocab=19))


def test_golden(update_golden: bool) -> None:
    assert_golden("recognize_activation", printed(stage("recognize_activation", layers=1).graph), update_golden)
