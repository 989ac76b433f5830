import pytest
import torch
from torch import Tensor

from tests.support.models import gpt2, opt, randomized
from tests.support.spelled import agree, calls_of, refusal
from tests.support.stages import assert_golden, assert_same_numbers, inputs, numbers, printed, stage
from tests.support.toys import Toy, toy
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding


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
    calls = [n for n in found.graph.nodes if is_tint(n, embedding)]
    assert [(argument(n, "index").name, argument(n, "offset")) for n in calls] == [
        ("input_ids", 0),
        ("position_ids", offset),
    ]
    assert found.context.facts.max_positions == 12 - offset
    assert found.context.facts.vocab_size == 19
    assert found.context.facts.hidden == 6
    assert not {
        op for op in found.operators() if "arange" in op or "cumsum" in op or "aten.embedding" in op
    }
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
    "reversed": (
        lambda m, x, ids: x + m.positions(arange(x).flip(0)),
        "neither the token ids nor consecutive positions",
    ),
    "strided": (
        lambda m, x, ids: x + m.positions(arange(x) * 2 % 12),
        "neither the token ids nor consecutive positions",
    ),
    "by token": (
        lambda m, x, ids: x + m.positions(arange(x) + ids.min()),
        "it computes with the ids",
    ),
    "other ids": (
        lambda m, x, ids: x + m.positions(ids // 2),
        "neither the token ids nor consecutive positions",
    ),
    "by weight": (
        lambda m, x, ids: x + m.positions(m.scale.abs().long().sum() * 0 + arange(x)),
        "depends on a weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_the_rest_alone_and_says_why(name: str) -> None:
    middle, reason = REFUSED[name]
    found = stage("recognize_embedding", model=toy(middle))
    left = [n for n in found.graph.nodes if "aten.embedding" in str(n.target)]
    assert len(left) == 1
    assert reason in info(left[0]).refused


@pytest.mark.parametrize("by_hand", [False, True])
def test_few_rows_that_repeat_are_types_and_no_positions(by_hand: bool) -> None:
    """As positions they would limit sequences to two tokens."""

    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        index = arange(x) % 2
        return x + (m.types.weight[index] if by_hand else m.types(index))

    model = toy(middle)
    model.types = torch.nn.Embedding(2, 6).double()
    assert "goes on behind the" in refusal(model)
    model.types = torch.nn.Embedding(3, 6).double()
    assert "behind the" not in refusal(model)


def test_a_model_without_positions_has_no_limit() -> None:
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        return m.linear(x)

    found = stage("recognize_embedding", model=toy(middle))
    assert found.context.facts.max_positions is None
    assert "position_ids" not in [n.name for n in found.graph.nodes]


@pytest.mark.parametrize(
    ("model", "offset"), [(opt(vocab=19), 2), (gpt2(vocab=19), 0)], ids=["opt", "gpt2"]
)
def test_models(model, offset: int) -> None:  # type: ignore[no-untyped-def]
    found = stage("recognize_embedding", model=model)
    assert sorted(argument(n, "offset") for n in found.graph.nodes if is_tint(n, embedding)) == [
        0,
        offset,
    ]
    assert found.context.facts.max_positions == 16
    assert_same_numbers("recognize_embedding", model=model)


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "recognize_embedding", printed(stage("recognize_embedding", layers=1).graph), update_golden
    )


class Sines(Toy):
    """Sinusoids of 10 positions in a buffer."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, ids: m.linear(x + m.sines[: x.shape[1]]))
        self.register_buffer(
            "sines",
            torch.outer(torch.arange(10.0), torch.tensor([1.0, 0.1, 0.01, 1.0, 0.1, 0.01])).sin(),
        )


def computed(x: Tensor) -> Tensor:
    each = arange(x)[:, None] / 10.0 ** torch.arange(3)
    return torch.stack([each.sin(), each.cos()], -1).flatten(1)


ADDED = {  # offset into a learned table, or None for a computed one; the longest sequence
    "a slice": (toy(lambda m, x, ids: x + m.positions.weight[: x.shape[1]]), 0, 12),
    "a slice from the second row": (
        toy(lambda m, x, ids: m.positions.weight[2 : x.shape[1] + 2] + x),
        2,
        10,
    ),
    "a slice of a batch": (
        toy(
            lambda m, x, ids: x + m.positions.weight[None, : x.shape[1]].expand(x.shape[0], -1, -1)
        ),
        0,
        12,
    ),
    "rows by number": (toy(lambda m, x, ids: x + m.positions.weight[arange(x)]), 0, 12),
    "a buffer": (randomized(Sines()).double(), None, 10),
    "computed": (toy(lambda m, x, ids: x + computed(x)), None, 64),
    "computed for a batch": (
        toy(lambda m, x, ids: x + computed(x)[None].expand(x.shape[0], -1, -1) * 2.0),
        None,
        64,
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_positions_may_be_added_without_an_embedding(name: str) -> None:
    model, offset, most = ADDED[name]
    found = agree(model, lengths=(1, 2, 7, 9, 10))
    tokens, positions = calls_of(found, embedding)
    assert argument(tokens, "index").name == "input_ids"
    assert (argument(positions, "index").name, argument(positions, "offset")) == (
        "position_ids",
        offset or 0,
    )
    assert found.context.facts.max_positions == most
    assert len(found.context.tables) == (offset is None)


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda m, x, ids: x + m.positions.weight[: x.shape[1]] * 2, "aten.mul.Tensor x1"),
        (lambda m, x, ids: x + m.positions.weight[: x.shape[1]].flip(0), "read from one row on"),
        (
            lambda m, x, ids: (
                x + torch.arange(x.shape[0])[:, None, None] * torch.ones(x.shape[1], 6)
            ),
            "differs between sequences",
        ),
        (lambda m, x, ids: x + torch.rand(x.shape[1], 6), "what it adds d"),
    ],
    ids=["doubled", "reversed", "by sequence", "noise"],
)
def test_what_is_added_and_no_table_is_refused(middle, reason: str) -> None:  # type: ignore[no-untyped-def]
    assert reason in refusal(toy(middle))
