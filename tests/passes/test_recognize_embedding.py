import pytest
import torch
from torch import Tensor

from tests.models import gpt2, opt
from tests.passes.stages import assert_golden, assert_same_numbers, inputs, numbers, printed, stage
from tests.passes.toys import Toy, toy
from tintc.compiler.dialect import argument, is_tint
from tintc.compiler.node_meta import info


def at(index: Tensor, x: Tensor) -> Tensor:
    return index.expand(x.shape[0], x.shape[1])


def arange(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


POSITIONS = {
    "arange": (lambda m, x, ids: x + m.positions(arange(x)), 0),
    "a batch of them": (lambda m, x, ids: x + m.positions(at(arange(x)[None], x)), 0),
    "offset": (lambda m, x, ids: x + m.positions(arange(x) + 3), 3),
    "cumsum of ones": (lambda m, x, ids: x + m.positions(torch.ones_like(ids).cumsum(1) - 1), 0),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_whatever_counts_is_a_position(name: str) -> None:
    middle, offset = POSITIONS[name]
    model = toy(middle)
    found = stage("recognize_embedding", model=model)
    calls = [n for n in found.graph.nodes if is_tint(n, "embedding")]
    assert [(argument(n, "index").name, argument(n, "offset")) for n in calls] == [("input_ids", 0), ("position_ids", offset)]
    assert found.context.facts.max_positions == 12 - offset
    assert found.context.facts.vocab_size == 19
    assert found.context.facts.hidden == 6
    assert not {op for op in found.operators() if "arange" in op or "cumsum" in op or "aten.embedding" in op}
    assert_same_numbers("recognize_embedding", model=model)


def test_positions_are_the_callers() -> None:
    found = stage("recognize_embedding", model=toy(POSITIONS["arange"][0]))
    here, there = inputs(length=5), inputs(length=5)
    there["position_ids"] = torch.tensor([[3, 1, 4, 1, 5]] * 2)
    weight = found.context.tensors["positions.weight"]
    head = found.context.tensors["head.weight"]
    moved = (weight[there["position_ids"]] - weight[here["position_ids"]]) @ head.t()
    assert torch.allclose(numbers(found, there) - numbers(found, here), moved)


REFUSED = {
    "reversed": (lambda m, x, ids: x + m.positions(arange(x).flip(0)), "neither the token ids nor consecutive positions"),
    "strided": (lambda m, x, ids: x + m.positions(arange(x) * 2 % 12), "neither the token ids nor consecutive positions"),
    "by token": (lambda m, x, ids: x + m.positions(arange(x) + ids.min()), "it computes with the ids"),
    "other ids": (lambda m, x, ids: x + m.positions(ids // 2), "neither the token ids nor consecutive positions"),
    "by weight": (lambda m, x, ids: x + m.positions(m.scale.abs().long().sum() * 0 + arange(x)), "depends on a weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_the_rest_alone_and_says_why(name: str) -> None:
    middle, reason = REFUSED[name]
    found = stage("recognize_embedding", model=toy(middle))
    left = [n for n in found.graph.nodes if "aten.embedding" in str(n.target)]
    assert len(left) == 1
    assert reason in info(left[0]).refused


def test_a_model_without_positions_has_no_limit() -> None:
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        return m.linear(x)

    found = stage("recognize_embedding", model=toy(middle))
    assert found.context.facts.max_positions is None
    assert "position_ids" not in [n.name for n in found.graph.nodes]


@pytest.mark.parametrize(("model", "offset"), [(opt(vocab=19), 2), (gpt2(vocab=19), 0)], ids=["opt", "gpt2"])
def test_models(model, offset: int) -> None:  # type: ignore[no-untyped-def]
    found = stage("recognize_embedding", model=model)
    assert sorted(argument(n, "offset") for n in found.graph.nodes if is_tint(n, "embedding")) == [0, offset]
    assert found.context.facts.max_positions == 16
    assert_same_numbers("recognize_embedding", model=model)


def test_golden(update_golden: bool) -> None:
    assert_golden("recognize_embedding", printed(stage("recognize_embedding", layers=1).graph), update_golden)
