import pytest
import torch

from tests.passes.stages import assert_golden, assert_same_numbers, printed, stage
from tests.passes.toys import toy
from tintc.compiler.node_meta import info

FORMS = {
    "one sum": (lambda m, x, ids: x + m.linear(x), 1),
    "a sum of sums": (lambda m, x, ids: (x + m.linear(x)) + m.norm(x + m.linear(x)), 3),
    "twice itself": (lambda m, x, ids: x + x, 1),
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
    "broadcast": lambda m, x, ids: m.linear(x) + m.positions(torch.arange(ids.shape[1]))[None] * 2.0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_the_rest_alone(name: str) -> None:
    found = stage("recognize_arithmetic", model=toy(REFUSED[name]))
    assert "tint.residual" not in found.operators()
    (left,) = [n for n in found.graph.nodes if "aten.add.Tensor" in str(n.target)]
    if name != "a scaled sum":
        assert info(left).refused == "it does not add two activations of equal shape"


def test_keeps_the_numbers() -> None:
    assert_same_numbers("recognize_arithmetic")


def test_golden(update_golden: bool) -> None:
    assert_golden("recognize_arithmetic", printed(stage("recognize_arithmetic", layers=1).graph), update_golden)
