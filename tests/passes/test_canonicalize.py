import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.models import gpt2
from tests.support.stages import assert_golden, assert_same_numbers, printed, stage
from tests.support.toys import Toy, toy


def test_strips_what_computes_nothing() -> None:
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        x = F.dropout(x.contiguous(), 0.5, training=False).to(torch.float64).clone()
        return m.linear(x[:, :].view(x.shape))

    model = toy(middle)
    found = stage("canonicalize", model=model)
    assert set(found.operators()) <= {
        "aten.embedding.default",
        "aten.linear.default",
        "aten.sym_size.int",
    }
    assert len(found.operators() - stage(None, model=model).operators()) == 0
    assert_same_numbers("canonicalize", model=model)


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, x, ids: x @ m.linear.weight,
        lambda m, x, ids: torch.addmm(m.linear.bias, x.view(-1, 6), m.linear.weight).view(x.shape),
        lambda m, x, ids: F.gelu(m.linear(x.view(-1, 6))).view(x.shape),
        lambda m, x, ids: F.linear(x, m.linear.weight.t()),
    ],
    ids=["matmul", "addmm", "merged", "transposed"],
)
def test_spells_linear_one_way(middle) -> None:  # type: ignore[no-untyped-def]
    """As GPT-2's Conv1D does it, with batch and tokens merged by a view, or as a product."""
    model = toy(middle)
    operators = stage("canonicalize", model=model).operators()
    assert operators["aten.linear.default"] == 2
    assert not {name for name in operators if "view" in name or "mm" in name or "matmul" in name}
    assert_same_numbers("canonicalize", model=model)


@pytest.mark.parametrize(
    ("middle", "kept"),
    [
        (lambda m, x, ids: m.linear((x * 9).long().double()), "aten.to.dtype"),
        (lambda m, x, ids: m.linear(x[:, :, 0:5].repeat(1, 1, 6)[..., :6]), "aten.slice.Tensor"),
        (lambda m, x, ids: x.view(-1, 6).softmax(0).view(x.shape), "aten.view.default"),
        (lambda m, x, ids: x.view(-1, 6).cumsum(0).view(x.shape), "aten.view.default"),
        (
            lambda m, x, ids: (x.view(-1, 6) + x.view(-1, 6).mean(0)).view(x.shape),
            "aten.view.default",
        ),
        (lambda m, x, ids: x @ x.transpose(1, 2) @ x, "aten.matmul.default"),
        (lambda m, x, ids: x.view(-1, 3).tanh().view(x.shape) * m.scale, "aten.view.default"),
    ],
    ids=[
        "a cast to integers",
        "a true slice",
        "softmax over tokens",
        "sum over tokens",
        "mean over tokens",
        "no parameter",
        "half a token",
    ],
)
def test_leaves_the_rest_alone(middle, kept: str) -> None:  # type: ignore[no-untyped-def]
    """What mixes tokens across the view must keep it; so must what really casts or cuts."""
    model = toy(middle)
    before, after = (
        stage(None, model=model).operators(),
        stage("canonicalize", model=model).operators(),
    )
    assert before[kept] >= after[kept] > 0
    assert_same_numbers("canonicalize", model=model)


def test_casts_between_float_types_go() -> None:
    """Precision is the operators' business; a model that works in half precision on its way is
    simulated without.
    """
    model = toy(lambda m, x, ids: m.linear(x.float()[..., :].double()).half().double())
    assert "aten.to.dtype" not in stage("canonicalize", model=model).operators()
    assert_same_numbers("canonicalize", 1e-3, model=model)


def test_keeps_the_numbers_of_models() -> None:
    assert_same_numbers("canonicalize")
    assert_same_numbers("canonicalize", model=gpt2(vocab=19))


def test_golden(update_golden: bool) -> None:
    assert_golden("canonicalize", printed(stage("canonicalize", layers=1).graph), update_golden)
