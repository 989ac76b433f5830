import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.models import gpt2
from tests.support.spelled import agree, calls_of, refusal
from tests.support.stages import assert_golden, assert_same_numbers, printed, stage
from tests.support.toys import Toy, toy
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.elementwise import residual, scale


def written_out(
    x: Tensor, half: float = 0.5, cubic: float = 0.044715, scale: float = math.sqrt(2 / math.pi)
) -> Tensor:
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
    kinds = [
        argument(node, "kind") for node in found.graph.nodes if is_tint(node, activation_forward)
    ]
    assert kinds == [kind]
    assert not {
        op
        for op in found.operators()
        if any(part in op for part in ("relu", "gelu", "silu", "tanh.", "pow"))
    }
    assert_same_numbers("recognize_activation", model=model)


NEARLY = {
    "another cubic": lambda m, x, ids: written_out(x, cubic=0.05),
    "another half": lambda m, x, ids: written_out(x, half=0.4),
    "another scale": lambda m, x, ids: written_out(x, scale=0.9),
    "two inputs": lambda m, x, ids: (
        0.5 * m.linear(x) * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "power of another": lambda m, x, ids: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * m.linear(x) ** 3)))
    ),
}


@pytest.mark.parametrize("name", NEARLY)
def test_nearly_a_gelu_is_none(name: str) -> None:
    model = toy(NEARLY[name])
    kinds = [
        argument(n, "kind")
        for n in stage("recognize_activation", model=model).graph.nodes
        if is_tint(n, activation_forward)
    ]
    assert kinds == ["tanh"]
    assert_same_numbers("recognize_activation", model=model)


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        F.leaky_relu,
        F.elu,
        F.relu6,
        F.softplus,
        F.hardswish,
        F.mish,
        torch.abs,
        lambda x: x**2,
        lambda x: x + 1.0,
    ],
)
def test_leaves_others_alone(function) -> None:  # type: ignore[no-untyped-def]
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        return function(m.linear(x))

    model = toy(middle)
    assert printed(stage("recognize_activation", model=model).graph) == printed(
        stage("recognize_embedding", model=model).graph
    )


def test_keeps_the_numbers_of_models() -> None:
    assert_same_numbers("recognize_activation")
    assert_same_numbers("recognize_activation", model=gpt2(vocab=19))


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "recognize_activation",
        printed(stage("recognize_activation", layers=1).graph),
        update_golden,
    )


SPELLINGS = {
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "sigmoid written out": (lambda x: 1 / (1 + torch.exp(-x)), "sigmoid"),
    "x * sigmoid": (lambda x: x * torch.sigmoid(x), "silu"),
    "x / (1 + exp)": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "clamped from below": (lambda x: x.clamp(min=0), "clamp"),
    "the larger of it and 0": (
        lambda x: torch.maximum(x, torch.tensor(0.0, dtype=x.dtype)),
        "maximum",
    ),
    "squared": (lambda x: F.relu(x) ** 2, "relu_squared"),
    "squared by itself": (lambda x: F.relu(x) * F.relu(x), "relu_squared"),
    "gelu by erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
    "gelu fast": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        "gelu_tanh",
    ),
    "gelu by powers": (
        lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))),
        "gelu_tanh",
    ),
    "gelu quick": (lambda x: x * torch.sigmoid(1.702 * x), "gelu_quick"),
    "relu with its half behind": (lambda x: (x + x.abs()) / 2, "maximum"),
    "gelu with its half behind": (
        lambda x: (x * (1.0 + torch.erf(x * 0.7071067811865476))) * 0.5,
        "gelu",
    ),
    "tanh written out": (lambda x: 2 * torch.sigmoid(2 * x) - 1, "tanh"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, kind = SPELLINGS[name]
    (node,) = calls_of(
        agree(toy(lambda m, x, ids: m.linear(function(m.linear(x))))), activation_forward
    )
    assert argument(node, "kind") == kind


MULTIPLES = {
    "product": (lambda x: 3 * x, 3.0),
    "quotient": (lambda x: x / 4, 0.25),
    "negation": (lambda x: -x, -1.0),
    "twice itself": (lambda x: x + x, 2.0),
    "itself and a part": (lambda x: x + 0.5 * x, 1.5),
    "of multiples": (lambda x: (x * 6**0.5) / 2, 6**0.5 / 2),
    "a tensor": (lambda x: x * torch.tensor(0.7, dtype=torch.float64), 0.7),
}


@pytest.mark.parametrize("name", MULTIPLES)
def test_multiples(name: str) -> None:
    function, factor = MULTIPLES[name]
    nodes = calls_of(agree(toy(lambda m, x, ids: m.linear(function(m.linear(x))))), scale)
    assert math.prod(argument(node, "factor") for node in nodes) == pytest.approx(factor, rel=1e-12)


def test_soft_caps_are_multiples_of_a_tanh() -> None:
    found = agree(toy(lambda m, x, ids: 5 * torch.tanh(m.linear(x) / 5)))
    assert [argument(n, "factor") for n in calls_of(found, scale)] == pytest.approx([0.2, 5.0])
    assert [argument(n, "kind") for n in calls_of(found, activation_forward)] == ["tanh"]


def test_a_residual_is_not_swallowed() -> None:
    for function in (F.silu, torch.tanh, F.gelu):
        found = agree(toy(lambda m, x, ids: x + function(x)))  # noqa: B023 (called at once)
        assert [len(calls_of(found, name)) for name in (residual, activation_forward)] == [1, 1]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.exp, "aten.exp.default"),
        (lambda x: x**2, "aten.pow.Tensor_Scalar"),
        (F.elu, "aten.elu.default"),
        (F.leaky_relu, "aten.leaky_relu.default"),
        (F.softplus, "aten.softplus.default"),
        (lambda x: x.clamp(-1, 1), "aten.clamp.default"),
        (lambda x: x * torch.sigmoid(x) + 1.0, "aten.add.Tensor"),
    ],
)
def test_unknown_functions_are_refused_by_name(function, name: str) -> None:  # type: ignore[no-untyped-def]
    assert f"{name} x1" in refusal(toy(lambda m, x, ids: function(m.linear(x))))
