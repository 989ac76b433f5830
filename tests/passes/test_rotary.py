"""Rotary positions in many spellings: read where they are one table for all heads, refused where
they are not.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import randomized
from tests.support.spelled import (
    agree,
    angles,
    calls_of,
    counted,
    heads,
    merged,
    refusal,
    rotate_half,
    rotated,
    turned,
)
from tests.support.stages import inputs, numbers
from tests.support.tolerances import SIMULATOR, error
from tests.support.toys import Toy
from tintc.ir.dialect import argument
from tintc.ir.ops.position import rotary


def neighbours(x: Tensor, size: int = 4) -> tuple[Tensor, Tensor]:
    cos, sin = angles(x, size)
    return cos[:, : size // 2], sin[:, : size // 2]


def stacked(q: Tensor, x: Tensor) -> Tensor:
    """GPT-J: neighbours turn, joined by stack and flatten."""
    cos, sin = neighbours(x)
    even, odd = q[..., ::2], q[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def repeated(q: Tensor, x: Tensor) -> Tensor:
    """GPT-J as transformers has it: tables repeated for neighbours, a rotated copy of the whole."""
    cos, sin = (y.repeat_interleave(2, -1) for y in neighbours(x))
    return q * cos + torch.stack([-q[..., 1::2], q[..., ::2]], -1).flatten(-2) * sin


def apart(q: Tensor, x: Tensor) -> Tensor:
    cos, sin = neighbours(x)
    first, second = q[..., :2], q[..., 2:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def by_complex_numbers(q: Tensor, x: Tensor) -> Tensor:
    """Meta's LLaMA: neighbours are one complex number, multiplied by another."""
    turned = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2)) * torch.complex(*neighbours(x))
    return torch.view_as_real(turned).flatten(-2)


def partial(q: Tensor, x: Tensor) -> Tensor:
    return torch.cat([rotated(q[..., :2], *angles(x, 2)), q[..., 2:]], -1)


def per_token(q: Tensor, x: Tensor) -> Tensor:
    """Before heads and tokens change places, with tables (B, T, 1, E)."""
    cos, sin = (table[None, :, None].expand(x.shape[0], -1, -1, -1) for table in angles(x))
    return rotated(q.transpose(1, 2), cos, sin).transpose(1, 2)


SPELLINGS = {
    "rotate half": (lambda q, x: rotated(q, *angles(x)), "half", 4),
    "halves apart": (apart, "half", 4),
    "roll": (
        lambda q, x: (
            q * angles(x)[0]
            + q.roll(2, -1) * torch.cat([-angles(x)[1][:, :2], angles(x)[1][:, 2:]], -1)
        ),
        "half",
        4,
    ),
    "sine first": (lambda q, x: angles(x)[1] * rotate_half(q) + angles(x)[0] * q, "half", 4),
    "per token": (per_token, "half", 4),
    "stack": (stacked, "interleaved", 4),
    "repeat": (repeated, "interleaved", 4),
    "complex": (by_complex_numbers, "interleaved", 4),
    "partial": (partial, "half", 2),
    "partial, all scaled": (lambda q, x: partial(q, x) * 0.5, "half", 2),
    "partial, rest scaled": (
        lambda q, x: torch.cat([rotated(q[..., :2], *angles(x, 2)), q[..., 2:] * 0.5], -1),
        "half",
        2,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_fires(name: str) -> None:
    change, pairing, size = SPELLINGS[name]
    found = agree(turned(change))
    both = calls_of(found, rotary)
    assert [argument(n, "pairing") for n in both] == [pairing] * 2
    assert [argument(n, "heads") for n in both] == [2, 2]
    assert {argument(argument(n, "cos"), "index").name for n in both} == {"position_ids"}
    assert {tuple(table.shape) for table in found.context.tables.values()} == {(64, size)}
    assert len(found.context.tables) == 2  # q and k share cos and sin
    assert found.context.facts.max_positions == 64


def test_positions_are_the_callers() -> None:
    """Relative positions are all that counts: a shift of all of them changes nothing, another order
    does.
    """
    found = agree(turned(lambda q, x: rotated(q, *angles(x))))
    plain, shifted, reversed_ = inputs(), inputs(), inputs()
    shifted["position_ids"] = plain["position_ids"] + 9
    reversed_["position_ids"] = plain["position_ids"].flip(-1)
    assert error(numbers(found, shifted), numbers(found, plain)) < SIMULATOR[torch.float64]
    assert error(numbers(found, reversed_), numbers(found, plain)) > 1e-6


@pytest.mark.parametrize(
    ("change", "tables"),
    [
        (lambda q, x: rotated(q, angles(x)[0] * 2, angles(x)[1] * counted(x)[:, None]), 2),
        (
            lambda q, x: (
                q * angles(x)[0] + torch.cat([q[..., 2:], q[..., :2]], -1) * angles(x, base=50.0)[1]
            ),
            2,
        ),
        (lambda q, x: rotated(q, *angles(x)) * 0.3, 2),
    ],
    ids=["xPos-like", "no rotation at all", "times a number"],
)
def test_what_positions_do_need_not_be_a_rotation(change, tables: int) -> None:  # type: ignore[no-untyped-def]
    assert len(agree(turned(change)).context.tables) == tables


def test_only_queries_turn() -> None:
    found = agree(turned(lambda q, x: rotated(q, *angles(x)), lambda k, x: k))
    assert len(calls_of(found, rotary)) == 1


class Short(Toy):
    """Tables in buffers of 9 rows."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, ids: x)
        cos, sin = angles(torch.empty(1, 9, 1))
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        y, length = self.wide(x), x.shape[1]
        q, k = (
            rotated(heads(part), self.cos[:length], self.sin[:length])
            for part in (y[..., :8], y[..., 8:16])
        )
        return self.head(
            merged(nn.functional.scaled_dot_product_attention(q, k, heads(x), is_causal=True))
        )


def test_a_short_table_limits_the_length() -> None:
    found = agree(randomized(Short()).double(), lengths=(2, 7, 8, 9))
    assert found.context.facts.max_positions == 9


REFUSED = {
    "values turn": (
        turned(lambda q, x: q, None, lambda v, x: v * angles(x, 6)[0][:, :3]),
        "position",
    ),
    "each head its own": (
        turned(
            lambda q, x: rotated(
                q, *(torch.stack(pair) for pair in zip(angles(x), angles(x, base=9.0), strict=True))
            )
        ),
        "its heads rotate differently",
    ),
    "mirrored pairs": (
        turned(lambda q, x: q * angles(x)[0] + q.flip(-1) * angles(x)[1]),
        "other pairs than halves or neighbours",
    ),
    "last coordinates": (
        turned(lambda q, x: torch.cat([q[..., :2], rotated(q[..., 2:], *angles(x, 2))], -1)),
        "other coordinates than the first of each are rotated",
    ),
    "scaled by position": (
        turned(lambda q, x: q * counted(x)[:, None]),
        "positions scale it without rotating it",
    ),
    "tokens change places": (
        turned(lambda q, x: rotated(q, *angles(x)).flip(2)),
        "it mixes tokens or sequences",
    ),
    "of another activation": (
        turned(lambda q, x: q * angles(x)[0] + heads(x @ x.new_ones(6, 8)) * angles(x)[1]),
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_the_rest_alone_and_says_why(name: str) -> None:
    model, reason = REFUSED[name]
    message = refusal(model)
    assert "scaled_dot_product_attention" in message
    assert reason in message


def test_two_frequencies_are_two_tables() -> None:
    """As in models whose local and global layers turn at different speeds."""

    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        for base in (100.0, 9.0):
            y = m.wide(x)
            q, k = (
                rotated(heads(part), *angles(x, base=base)) for part in (y[..., :8], y[..., 8:16])
            )
            x = x + m.linear(
                merged(
                    nn.functional.scaled_dot_product_attention(
                        q, k, heads(m.linear(x)), is_causal=True
                    )
                )
            )
        return x

    found = agree(randomized(Toy(middle)).double())
    assert len(found.context.tables) == 4
