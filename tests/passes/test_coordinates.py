"""Layout operators are followed by running them on coordinates: any composition of them leads back
to the numbers it moved.
"""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.support.spelled import HIDDEN
from tests.support.stages import Stage, stage
from tests.support.toys import Toy, toy
from tintc.ir.layout import Rows
from tintc.passes.analysis.coordinates import BATCH, LENGTH, Trace, Untraceable, trace
from tintc.passes.analysis.heads import read_columns, read_heads, rows_of
from tintc.passes.analysis.patterns import calls

Change = Callable[[Tensor], Tensor]


def at(change: Callable[[Tensor, Toy], Tensor]) -> tuple[fx.Node, Stage]:
    """The node of change(x), x (B, T, 18), in a graph where linear layers are recognised."""
    model = toy(lambda m, x, ids: torch.cos(change(m.wide(x), m)).sum() * x)
    found = stage("recognize_embedding", model=model)
    (node,) = [n for n in found.graph.nodes if calls(n, torch.ops.aten.cos)]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source, found


def followed(found: Trace, x: Tensor) -> Tensor:
    """The value that a trace without tables says that the node has."""
    total = torch.zeros(found.terms[0].index.shape, dtype=x.dtype)
    for term in found.terms:
        assert not term.factors
        total += torch.where(
            term.index >= 0, term.coefficient * x.flatten()[term.index.clamp(min=0)], 0
        )
    return total


STEPS: dict[str, tuple[Callable[[Tensor], bool], Change]] = {
    "transpose": (lambda x: x.ndim == 4, lambda x: x.transpose(1, 2)),
    "swap the last two": (lambda x: x.ndim == 4, lambda x: x.transpose(-1, -2)),
    "permute": (lambda x: x.ndim == 4, lambda x: x.permute(0, 3, 1, 2)),
    "unflatten 2": (
        lambda x: x.ndim < 5 and x.shape[-1] % 2 == 0,
        lambda x: x.unflatten(-1, (2, -1)),
    ),
    "unflatten 3": (
        lambda x: x.ndim < 5 and x.shape[-1] % 3 == 0,
        lambda x: x.unflatten(-1, (-1, 3)),
    ),
    "first half": (lambda x: x.shape[-1] % 2 == 0, lambda x: x.chunk(2, -1)[0]),
    "second half": (lambda x: x.shape[-1] % 2 == 0, lambda x: x.chunk(2, -1)[1]),
    "all but one": (lambda x: x.shape[-1] > 2, lambda x: x.split([1, x.shape[-1] - 1], -1)[1]),
    "every other": (lambda x: x.shape[-1] > 1, lambda x: x[..., ::2]),
    "flip": (lambda x: True, lambda x: x.flip(-1)),
    "roll": (lambda x: True, lambda x: x.roll(1, -1)),
    "repeat": (lambda x: x.shape[-1] < 19, lambda x: x.repeat_interleave(2, -1)),
    "negate": (lambda x: True, lambda x: -x),
    "scale": (lambda x: True, lambda x: x * 0.5),
    "turn": (
        lambda x: x.shape[-1] % 2 == 0,
        lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1),
    ),
    "stack": (lambda x: x.ndim < 5 and x.shape[-1] < 10, lambda x: torch.stack([x, -x], -1)),
    "add": (lambda x: x.ndim >= 4, lambda x: x + x.flip(-1)),
    "subtract": (lambda x: x.ndim >= 4, lambda x: x - 3.0 * x.roll(1, -1)),
    "select": (lambda x: x.ndim == 5, lambda x: x[..., 0]),
}


def composed(seed: int, count: int) -> list[Change]:
    """A random chain of steps, each of which the value before it allows."""
    chance, chain, shape = random.Random(seed), [], torch.empty(BATCH, LENGTH, 18)
    shape = shape.view(BATCH, LENGTH, 3, 6)
    for _ in range(count):
        step = chance.choice([change for allowed, change in STEPS.values() if allowed(shape)])
        chain.append(step)
        shape = step(shape)
    return chain


def run(chain: list[Change], x: Tensor) -> Tensor:
    x = x.view(x.shape[0], x.shape[1], 3, 6)
    for step in chain:
        x = step(x)
    return x


@pytest.mark.slow
def test_a_trace_says_where_every_number_comes_from() -> None:
    """60 chains in one model, since exporting takes longer than following."""
    chains = [composed(seed, 1 + seed % 6) for seed in range(60)]
    model = toy(
        lambda m, x, ids: (
            x * torch.stack([torch.cos(run(chain, m.wide(x))).sum() for chain in chains]).sum()
        )
    )
    found = stage("recognize_embedding", model=model)
    ends = [n for n in found.graph.nodes if calls(n, torch.ops.aten.cos)]
    x = torch.randn(BATCH, LENGTH, 18, dtype=torch.float64)
    assert len(ends) > 50  # chains that are alike are merged
    values = [run(chain, x) for chain in chains]
    for end in ends:
        (source,) = end.all_input_nodes
        traced = trace(source, found.context)
        assert calls(traced.root, torch.ops.aten.linear)
        value = followed(traced, x)
        assert any(
            value.shape == other.shape and torch.allclose(value, other, rtol=1e-12, atol=1e-12)
            for other in values
        )


def test_tables_are_factors() -> None:
    node, found = at(
        lambda x, m: (
            x.view(*x.shape[:2], 3, 6) * torch.arange(x.shape[1])[:, None, None] * torch.ones(6)
        )
    )
    (term,) = trace(node, found.context).terms
    assert [int(index.amax()) for _, index in term.factors] == [LENGTH - 1, 5]
    assert torch.equal(term.factors[0][1][0, :, 0, 0], torch.arange(LENGTH))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x, m: torch.cat([x[..., :6], m.linear(x[..., :6])], -1)[:, :, None],
            "it joins parts of several activations",
        ),
        (lambda x, m: x[:, :, None] + m.wide(x[..., :6])[:, :, None], "it adds two activations"),
        (lambda x, m: x[:, :, None] / torch.arange(1, 19), "it divides by a table"),
        (
            lambda x, m: m.scale.expand(x.shape[0], x.shape[1], 1, 6),
            "expected views, transposes and rotations of one",
        ),
    ],
    ids=["two roots", "a sum", "a quotient", "a weight"],
)
def test_says_what_cannot_be_followed(change, reason: str) -> None:  # type: ignore[no-untyped-def]
    node, found = at(change)
    with pytest.raises(Untraceable, match=reason):
        trace(node, found.context)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4))
def test_rows_of_ranges_that_repeat(times: int, size: int, before: int, behind: int) -> None:
    period = before + size + behind
    used = torch.cat([torch.arange(before, before + size) + i * period for i in range(times)])
    rows = rows_of(used, times * period)
    found = [r for r in range(times * period) if rows.start <= r % rows.period < rows.stop]
    assert found == used.tolist()


@given(st.sets(st.integers(0, 23), min_size=1), st.sampled_from([24, 25, 30]))
def test_rows_of_anything_are_these_rows_or_refused(used: set[int], width: int) -> None:
    try:
        rows = rows_of(torch.tensor(sorted(used)), width)
    except Untraceable:
        return
    assert {r for r in range(width) if rows.start <= r % rows.period < rows.stop} == used
    assert width % rows.period == 0


GROUPED = {  # spelling of (B, H, T, 3) from (B, T, 18): rows, heads, groups
    "one after another": (
        lambda x: x[..., 6:12].view(*x.shape[:2], 2, 3).transpose(1, 2),
        Rows(6, 12, 18),
        2,
        2,
    ),
    "head by head": (
        lambda x: x.view(*x.shape[:2], 2, 9).transpose(1, 2)[..., 3:6],
        Rows(3, 6, 9),
        2,
        2,
    ),
    "head by head, unbound": (
        lambda x: x.view(*x.shape[:2], 2, 3, 3).unbind(3)[2].transpose(1, 2),
        Rows(6, 9, 9),
        2,
        2,
    ),
    "group by group": (
        lambda x: x.view(*x.shape[:2], 2, 3, 3)[..., :2, :].flatten(2, 3).transpose(1, 2),
        Rows(0, 6, 9),
        4,
        4,
    ),
    "the key of each group": (
        lambda x: (
            x.view(*x.shape[:2], 2, 3, 3)[..., 1:2, :]
            .expand(-1, -1, -1, 2, -1)
            .flatten(2, 3)
            .transpose(1, 2)
        ),
        Rows(3, 6, 9),
        4,
        2,
    ),
    "repeated": (
        lambda x: x[..., :6].view(*x.shape[:2], 2, 3).transpose(1, 2).repeat_interleave(3, 1),
        Rows(0, 6, 18),
        6,
        2,
    ),
    "one for all": (
        lambda x: x[..., 15:].unsqueeze(1).expand(-1, 4, -1, -1),
        Rows(15, 18, 18),
        4,
        1,
    ),
    "merged with the batch": (
        lambda x: x.view(*x.shape[:2], 6, 3).transpose(1, 2).flatten(0, 1)[:, None],
        Rows(0, 18, 18),
        6,
        6,
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_heads_in_every_layout(name: str) -> None:
    change, rows, count, groups = GROUPED[name]
    node, found = at(lambda x, m: change(x))
    if name == "merged with the batch":
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    read = read_heads(node, found.context)
    assert (read.rows, read.heads, read.groups, read.width, read.factor, read.rotation) == (
        rows,
        count,
        groups,
        3,
        1.0,
        None,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x: x[..., :6].view(*x.shape[:2], 2, 3).transpose(1, 2).repeat(1, 2, 1, 1),
            "in another order",
        ),
        (lambda x: x[..., :6].view(*x.shape[:2], 2, 3).transpose(1, 2).flip(1), "in another order"),
        (
            lambda x: x.view(*x.shape[:2], 3, 6).transpose(1, 2).flip(2),
            "it mixes tokens or sequences",
        ),
        (
            lambda x: x.view(*x.shape[:2], 3, 6).transpose(1, 2).roll(1, 0),
            "it mixes tokens or sequences",
        ),
        (
            lambda x: (
                x.view(*x.shape[:2], 3, 6).transpose(1, 2) * torch.tensor([1.0, 1, 1, 2, 2, 2])
            ),
            "positions scale it without rotating it",
        ),
        (
            lambda x: x[..., [0, 1, 3, 4, 5, 7]].view(*x.shape[:2], 2, 3).transpose(1, 2),
            "expected a range that repeats",
        ),
    ],
    ids=["tiled", "reversed", "tokens reversed", "another sequence", "scaled apart", "no range"],
)
def test_other_heads_are_refused(change, reason: str) -> None:  # type: ignore[no-untyped-def]
    node, found = at(lambda x, m: change(x))
    with pytest.raises(Untraceable, match=reason):
        read_heads(node, found.context)


def test_columns() -> None:
    node, found = at(lambda x, m: x[..., 3:9].exp())
    (source,) = node.all_input_nodes
    root, rows = read_columns(source, found.context)
    assert (rows, calls(root, torch.ops.aten.linear)) == (Rows(3, 3 + HIDDEN, 18), True)
    for change in (
        lambda x: x[..., :6] * 2.0,
        lambda x: x[..., :6].flip(-1),
        lambda x: x[..., :6].flip(1),
        lambda x: x.view(*x.shape[:2], 3, 6),
    ):
        node, found = at(lambda x, m: change(x))  # noqa: B023 (called at once)
        with pytest.raises(Untraceable):
            read_columns(node, found.context)
