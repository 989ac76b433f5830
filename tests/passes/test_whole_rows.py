"""`whole_rows`, a part of `canonicalize`: some of the rows as all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.grid import some
from tests.support.stages import assert_golden, assert_same_numbers, printed, stage
from tests.support.toys import Middle, Toy, toy


def by_token(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for kind in range(3):
        here = ids % 3 == kind
        y[here] = m.norm(F.gelu(m.linear(x[here])) / (kind + 1)) + m.scale
    return y


def by_sequence(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """Rows with an axis of tokens; which sequences says no token."""
    here = torch.zeros(x.shape[0]) == 0
    z = x.clone()
    z[here] = m.wide(x[here]).chunk(3, -1)[1].softmax(1) * x[here][..., :1]
    return z


def by_count(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """Each token's best of three weights: tokens sorted by it, cut where the counts say, joined."""
    flat = x.flatten(0, 1)
    best = m.linear(flat)[:, :3].argmax(-1)
    counts = F.one_hot(best, 3).sum(0).tolist()
    order = best.argsort(stable=True)
    weights = m.wide.weight.unflatten(0, (3, -1))
    parts = [F.linear(p, w) for p, w in zip(flat[order].split(counts), weights, strict=True)]
    return torch.zeros_like(flat).index_add(0, order, torch.cat(parts)).view(x.shape)


ALL: dict[str, Middle] = {
    "by token": by_token,
    "by sequence": by_sequence,
    "by count": by_count,
}
OF_DATA = {"aten.index_put.default", "aten.split_with_sizes.default", "aten.item.default"}


@some("name", list(ALL), default=["by token"])
def test_all_rows_are_computed(name: str) -> None:
    model = toy(ALL[name])
    before = stage(None, model=model).operators()
    after = stage("canonicalize", model=model).operators()
    assert before.keys() & OF_DATA
    assert not after.keys() & OF_DATA
    assert after["aten.where.self"] == {"by token": 3, "by sequence": 1, "by count": 2}[name]
    assert_same_numbers("canonicalize", model=model)


def put(change) -> Middle:  # type: ignore[no-untyped-def]
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        here, y = ids % 2 == 0, x.clone()
        y[here] = change(m, x, here)
        return y

    return middle


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x, here: x[here].square().sqrt(),  # its gradient at 0 is no number
        lambda m, x, here: 1 / x[here],
        lambda m, x, here: x[here] - x[here].mean(0),
        lambda m, x, here: x[here].softmax(0),
        lambda m, x, here: x[here].flip(0),
        lambda m, x, here: x[~here][:1],
        lambda m, x, here: F.layer_norm(x[here].unsqueeze(0), x.shape[-1:])[0],
    ],
    ids=["root", "quotient", "mean", "over rows", "order", "other rows", "another first axis"],
)
def test_what_is_no_work_on_each_row_stays(change) -> None:  # type: ignore[no-untyped-def]
    operators = stage("canonicalize", model=toy(put(change))).operators()
    assert operators["aten.index_put.default"] == 1


def test_a_part_that_is_left_out_stays() -> None:
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        count = (ids == 0).sum().item()
        first, second = flat.split([count, flat.shape[0] - count])
        return torch.cat([second, first]).view(x.shape)  # in another order

    operators = stage("canonicalize", model=toy(middle)).operators()
    assert operators["aten.split_with_sizes.default"] == 1


def test_golden(update_golden: bool) -> None:
    graph = stage("canonicalize", model=toy(by_count)).graph
    assert_golden("whole_rows", printed(graph), update_golden)
