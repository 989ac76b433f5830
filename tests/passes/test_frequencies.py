"""Rotations whose frequencies depend on the greatest position: read by what the graph computes,
in several spellings; refused where they depend on the length in any other way.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.spelled import agree, calls_of, counted, refusal, rotated, turned
from tests.support.stages import assert_golden, printed
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import capture
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import embedding
from tintc.ir.ops.position import at_length, rotary, wave

INVERSE = torch.tensor([1.0, 0.1], dtype=torch.float64)
Frequencies = Callable[[Tensor], Tensor]  # of the length, a number: (2,)


def length(x: Tensor) -> Tensor:
    return counted(x).max() + 1


def grows(n: Tensor) -> Tensor:
    """With every token."""
    return INVERSE / (1 + 0.05 * n)


def grows_above(n: Tensor) -> Tensor:
    """NTK scaling: with every token from the tenth on."""
    return torch.where(n > 10, INVERSE ** (1 + 0.01 * (n - 10)), INVERSE)


def one_of_two(n: Tensor) -> Tensor:
    return torch.where(n > 10, INVERSE * 0.3, INVERSE)


def both(x: Tensor, frequencies: Frequencies) -> Tensor:
    each = torch.outer(counted(x).double(), frequencies(length(x)))
    return torch.cat([each, each], -1)


def plain(frequencies: Frequencies, scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    def change(q: Tensor, x: Tensor) -> Tensor:
        angle = both(x, frequencies)
        return rotated(q, scale * angle.cos(), scale * angle.sin())

    return change


def complex_numbers(q: Tensor, x: Tensor) -> Tensor:
    each = torch.outer(counted(x).double(), grows_above(length(x)))
    table = torch.polar(torch.ones_like(each), each)
    pairs = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2)


SPELLINGS = {
    "every length": (plain(grows), 64),
    "above some length": (plain(grows_above), 55),
    "two sets": (plain(one_of_two), 2),
    "scaled": (plain(one_of_two, 1.3), 2),
    "complex": (complex_numbers, 55),
    "part of a head": (
        lambda q, x: torch.cat([plain_of_two(q[..., :2], x), q[..., 2:]], -1),
        55,
    ),
}


def plain_of_two(q: Tensor, x: Tensor) -> Tensor:
    angle = both(x, grows_above)[:, 1::2]
    return rotated(q, angle.cos(), angle.sin())


@pytest.mark.parametrize("name", SPELLINGS)
def test_fires(name: str) -> None:
    """And agrees at lengths on both sides; `rows` lengths have frequencies of their own."""
    change, rows = SPELLINGS[name]
    found = agree(turned(change), lengths=(2, 10, 11, 40))
    assert len(calls_of(found, rotary)) == 2 and len(calls_of(found, wave)) == 2
    assert found.context.facts.by_length and found.context.facts.max_positions == 64
    read = {argument(node, "frequency") for node in calls_of(found, wave)}
    assert {info(argument(node, "table")).shape[0] for node in read} == {rows}
    # q and k share cos and sin, and these what they are of
    assert len(calls_of(found, at_length)) == 3


def test_golden(update_golden: bool) -> None:
    found = agree(turned(plain(one_of_two)), lengths=(9, 12))
    assert_golden("rotary_by_length", printed(found.graph), update_golden)


def added(q: Tensor, x: Tensor) -> Tensor:
    """The length shifts what stands behind the cosine."""
    angle = both(x, grows)
    return rotated(q, angle.cos() + 0.01 * length(x), angle.sin())


def two_tables(q: Tensor, x: Tensor) -> Tensor:
    """Of which the length chooses one."""
    few, many = both(x, lambda n: INVERSE), both(x, lambda n: INVERSE * 0.3)
    cos, sin = (
        torch.where(length(x) > 10, long, short)
        for short, long in ((few.cos(), many.cos()), (few.sin(), many.sin()))
    )
    return rotated(q, cos, sin)


def shifted(q: Tensor, x: Tensor) -> Tensor:
    """An angle that is no multiple of the position."""
    angle = both(x, grows) + 0.1 * length(x)
    return rotated(q, angle.cos(), angle.sin())


def squared(q: Tensor, x: Tensor) -> Tensor:
    angle = both(x, grows) ** 2
    return rotated(q, angle.cos(), angle.sin())


def by_size(q: Tensor, x: Tensor) -> Tensor:
    """The length is no number of the graph's values, but their size."""
    angle = torch.outer(counted(x).double(), INVERSE / x.shape[1]).repeat(1, 2)
    return rotated(q, angle.cos(), angle.sin())


def mixed(q: Tensor, x: Tensor) -> Tensor:
    """One table has a cosine and a sine."""
    angle = both(x, grows)
    half = torch.arange(4) < 2
    return rotated(q, torch.where(half, angle.cos(), angle.sin()), angle.sin())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (added, "neither of cosines nor of sines"),
        (two_tables, "not position times frequency"),
        (shifted, "not position times frequency"),
        (squared, "not position times frequency"),
        (by_size, "by something else than frequencies of the greatest position"),
        (mixed, "neither of cosines nor of sines"),
    ],
)
def test_leaves_the_rest_alone_and_says_why(
    change: Callable[[Tensor, Tensor], Tensor], reason: str
) -> None:
    said = refusal(turned(change))
    assert "its rotation depends on the length of the sequence" in said and reason in said


def test_a_fixed_rule_is_a_table() -> None:
    found = agree(turned(plain(lambda n: INVERSE)))
    assert not calls_of(found, wave) and not found.context.facts.by_length
    assert calls_of(found, embedding)


class Faded(nn.Module):
    """An activation that no pass knows, halved in calls of more than `most` tokens."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.tokens, self.up, self.head = nn.Embedding(19, 6), nn.Linear(6, 6), nn.Linear(6, 19)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + F.mish(self.up(x)) * torch.where(length(x) > self.most, 0.5, 1.0).double()
        logits: Tensor = self.head(x)
        return logits


def test_an_island_of_another_length_is_refused() -> None:
    """However far out that length is: islands themselves are looked at up to 640 tokens."""
    with pytest.raises(UnsupportedModelError, match="what it reads of positions is another with"):
        lower(capture(Faded(2000).double().eval()), SimulatorConfig.exact())
    program = lower(capture(Faded(5000).double().eval()), SimulatorConfig.exact())
    assert not program.facts.by_length
