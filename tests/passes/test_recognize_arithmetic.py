import pytest
import torch
import torch.nn.functional as F

from tests.support.spelled import agree, calls_of, refusal
from tests.support.stages import assert_golden, assert_same_numbers, printed, stage
from tests.support.toys import toy
from tintc.ir.node_meta import info
from tintc.ir.ops.elementwise import multiply

FORMS = {
    "one sum": (lambda m, x, ids: x + m.linear(x), 1),
    "a sum of sums": (lambda m, x, ids: (x + m.linear(x)) + m.norm(m.linear(x) + x), 3),
    "a sum twice": (lambda m, x, ids: (x + m.linear(x)) + m.norm(x + m.linear(x)), 2),
    "in place": (lambda m, x, ids: m.linear(x).add_(x), 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_fires(name: str) -> None:
    middle, count = FORMS[name]
    model = toy(middle)
    found = stage("recognize_arithmetic", model=model).operators()
    assert found["tint.residual"] == count
    assert not {op for op in found if op.startswith("aten")}
    assert_same_numbers("recognize_arithmetic", model=model)


REFUSED = {
    "a weight": lambda m, x, ids: x + m.scale,
    "a number": lambda m, x, ids: x + 1.0,
    "a scaled sum": lambda m, x, ids: torch.add(x, m.linear(x), alpha=2),
    "broadcast": lambda m, x, ids: (
        m.linear(x) + m.positions(torch.arange(ids.shape[1]))[None] * 2.0
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_the_rest_alone(name: str) -> None:
    found = stage("recognize_arithmetic", model=toy(REFUSED[name]))
    assert "tint.residual" not in found.operators()
    (left,) = [n for n in found.graph.nodes if "aten.add.Tensor" in str(n.target)]
    assert (
        name == "a scaled sum"
        or info(left).refused == "it does not add two activations of equal shape"
    )


def test_keeps_the_numbers() -> None:
    assert_same_numbers("recognize_arithmetic")


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "recognize_arithmetic",
        printed(stage("recognize_arithmetic", layers=1).graph),
        update_golden,
    )


GATES = {
    "a gate": (lambda m, x, ids: F.silu(m.linear(x)) * m.norm(x), 1),
    "a square": (lambda m, x, ids: m.linear(x) * m.linear(x), 1),
    "gate and up in one product": (
        lambda m, x, ids: (lambda a, b, c: F.gelu(a) * b + c)(*m.wide(x).chunk(3, -1)),
        1,
    ),
    "gate and up by turns": (
        lambda m, x, ids: F.silu(m.wide(x)[..., ::3]) * m.wide(x)[..., 1::3],
        1,
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    middle, count = GATES[name]
    assert len(calls_of(agree(toy(middle)), multiply)) == count


NO_GATES = {
    "a number for each token": lambda m, x, ids: x * x.mean(-1, keepdim=True),
    "a position": lambda m, x, ids: m.linear(x) * torch.arange(x.shape[1])[:, None],
    "a buffer": lambda m, x, ids: m.linear(x) * torch.ones(6),
    "a quotient": lambda m, x, ids: m.linear(x) / m.norm(x),
    "a difference": lambda m, x, ids: m.linear(x) - m.norm(x),
}


@pytest.mark.parametrize("name", NO_GATES)
def test_other_arithmetic_is_refused(name: str) -> None:
    message = refusal(toy(NO_GATES[name]))
    assert {"a quotient": "aten.div", "a difference": "aten.sub"}.get(
        name, "aten.mul.Tensor x1"
    ) in message
