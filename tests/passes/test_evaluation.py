"""What depends on the sizes alone is known without being matched; what depends on tokens or weights
never is.
"""

import pytest
import torch
from torch import fx

from tests.support.stages import Stage, stage
from tests.support.toys import toy
from tintc.ir.builder import Builder
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding
from tintc.passes.analysis.evaluation import (
    LONGEST,
    Evaluation,
    constant,
    evaluable,
    evaluated_length,
    is_positional,
    is_weight,
)
from tintc.passes.analysis.patterns import calls
from tintc.passes.analysis.tables import read_table


def at(change) -> tuple[fx.Node, Stage]:  # type: ignore[no-untyped-def]
    """The node of change(m, x, ids), as captured."""
    found = stage(None, model=toy(lambda m, x, ids: x * torch.cos(change(m, x, ids)).sum()))
    (node,) = [n for n in found.graph.nodes if calls(n, torch.ops.aten.cos)]
    (source,) = node.all_input_nodes
    return source, found


POSITIONAL = {
    "arange": lambda m, x, ids: torch.arange(x.shape[1]) * 0.5,
    "shape of an activation": lambda m, x, ids: torch.ones(x.shape[0], x.shape[1]).cumsum(1) - 1,
    "a mask": lambda m, x, ids: torch.full((x.shape[1], x.shape[1]), -1.0).triu(1),
    "ones like the ids": lambda m, x, ids: torch.ones_like(ids).cumsum(1) / 2,
}
OTHER = {
    "tokens": lambda m, x, ids: ids * 0.5,
    "a weight": lambda m, x, ids: m.scale * torch.arange(6),
    "an activation": lambda m, x, ids: x.mean(1),
    "a mask of tokens": lambda m, x, ids: torch.arange(x.shape[1]) * (ids == 3),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional(name: str) -> None:
    node, found = at(POSITIONAL[name])
    assert is_positional(node)
    for batch, length in ((1, 3), (2, 9)):
        x, ids = torch.zeros(batch, length, 6), torch.ones(batch, length, dtype=torch.int64)
        assert torch.equal(
            Evaluation(batch, length, found.context).of(node), POSITIONAL[name](None, x, ids)
        )


@pytest.mark.parametrize("name", OTHER)
def test_not_positional(name: str) -> None:
    node, found = at(OTHER[name])
    assert not is_positional(node)
    assert constant(node, found.context) is None


def test_buffers_are_no_weights() -> None:
    model = toy(lambda m, x, ids: x * m.root)
    model.register_buffer("root", torch.tensor(6**0.5))
    found = stage(None, model=model)
    by_name = {info(n).parameter: n for n in found.graph.nodes if info(n).role == "parameter"}
    assert [is_weight(by_name["root"]), is_weight(by_name["scale"]), is_weight(None)] == [
        False,
        True,
        False,
    ]
    assert constant(by_name["root"], found.context) == float(torch.tensor(6**0.5))


def test_constants() -> None:
    found = stage(None, model=toy(lambda m, x, ids: x))
    assert constant(3, found.context) == 3.0
    assert constant(True, found.context) is None
    assert constant("sum", found.context) is None
    for change, value in (
        (lambda m, x, ids: torch.full((1,), 2.5) * 2, 5.0),
        (lambda m, x, ids: torch.full((), x.shape[1]), None),
        (lambda m, x, ids: torch.full((), x.shape[0]), None),
        (lambda m, x, ids: torch.ones(2), None),
    ):
        node, found = at(change)
        assert constant(node, found.context) == value


def test_the_greatest_length_that_all_tables_have() -> None:
    model = toy(
        lambda m, x, ids: (
            x
            * torch.cos(m.short[torch.arange(x.shape[1])] * m.long[torch.arange(x.shape[1])]).sum()
        )
    )
    model.register_buffer("short", torch.randn(9, 2))
    model.register_buffer("long", torch.randn(30, 2))
    found = stage(None, model=model)
    (node,) = [n for n in found.graph.nodes if calls(n, torch.ops.aten.cos)]
    picked = [n for n in found.graph.nodes if calls(n, torch.ops.aten.index)]
    assert evaluable([node], 64, found.context).length == 9
    assert [evaluable([n], 64, found.context).length for n in picked] == [9, 30]
    assert evaluable([node], 7, found.context).length == 7
    with pytest.raises(IndexError):
        Evaluation(1, 10, found.context).of(node)


def test_equal_tables_are_one() -> None:
    found = stage("recognize_embedding")
    build, like = Builder(found.graph), found.named("tokens")
    with found.graph.inserting_after(like):
        first = read_table(build, found.context, torch.arange(20.0).view(10, 2), "table", like)
        again = read_table(build, found.context, torch.arange(20).view(10, 2), "another", like)
        other = read_table(build, found.context, torch.arange(18.0).view(9, 2), "table", like)
    assert again is first
    assert is_tint(other, embedding) and other is not first
    assert [tuple(table.shape) for table in found.context.tables.values()] == [(10, 2), (9, 2)]
    assert all(table.dtype == torch.float64 for table in found.context.tables.values())
    assert info(first).shape == ("B", "T", 2)
    assert found.context.facts.max_positions == 9
    assert evaluated_length(found.context) == 9
    found.context.learn(max_positions=None)
    assert evaluated_length(found.context) == LONGEST
