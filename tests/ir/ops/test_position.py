"""tintc.ir.ops.position: rotary positions against complex numbers and torch.autograd, windows
against loops.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, batches, lengths, seeds
from tests.support.tolerances import PRIMITIVE, error
from tintc.ir.ops.position import PAIRINGS, WAVES, at_length, partner, rotary, wave, window_mask

LIMIT = PRIMITIVE[torch.float64]
pairings = st.sampled_from(PAIRINGS)


def in_pairs(x: Tensor, pairing: str) -> Tensor:
    """(..., R) -> (..., R / 2, 2): every coordinate with its partner."""
    return x.unflatten(-1, (2, -1)).mT if pairing == "half" else x.unflatten(-1, (-1, 2))


def out_of_pairs(x: Tensor, pairing: str) -> Tensor:
    return x.mT.flatten(-2) if pairing == "half" else x.flatten(-2)


def tables(angles: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """cos and sin of (..., R / 2) angles, with the signs that make a rotation: x_0 cos - x_1 sin,
    x_1 cos + x_0 sin.
    """
    cos, sin = (
        torch.stack(both, -1)
        for both in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin()))
    )
    return out_of_pairs(cos, pairing), out_of_pairs(sin, pairing)


def turned(x: Tensor, angles: Tensor, heads: int, pairing: str) -> Tensor:
    """Head by head as complex numbers; the rest of each head stays."""
    out, r = [], 2 * angles.shape[-1]
    for head in x.chunk(heads, -1):
        pairs = in_pairs(head[..., :r], pairing)
        after = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.polar(
            torch.ones_like(angles), angles
        )
        out += [out_of_pairs(torch.stack([after.real, after.imag], -1), pairing), head[..., r:]]
    return torch.cat(out, -1)


@given(batches, lengths, st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), pairings, seeds)
def test_rotary_turns_pairs(
    b: int, t: int, heads: int, half: int, rest: int, pairing: str, seed: int
) -> None:
    draw = Draw(seed)
    x, dy, angles = (
        draw(b, t, heads * (2 * half + rest)),
        draw(b, t, heads * (2 * half + rest)),
        draw(b, t, half, scale=3.0),
    )
    cos, sin = tables(angles, pairing)
    expected = turned(x, angles, heads, pairing)
    found = rotary(x, cos, sin, heads, pairing, False)
    assert error(found, expected) < LIMIT
    (dx,) = torch.autograd.grad(expected, x, dy)
    assert error(rotary(dy, cos, sin, heads, pairing, True), dx) < LIMIT
    # A rotation's transpose is its inverse.
    assert error(rotary(found, cos, sin, heads, pairing, True), x) < LIMIT


@given(
    batches,
    lengths,
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 3),
    pairings,
    st.booleans(),
    seeds,
)
def test_the_backward_pass_needs_no_rotation(
    b: int, t: int, heads: int, half: int, rest: int, pairing: str, transpose: bool, seed: int
) -> None:
    """Whatever the tables hold (scaled ones, say), `transpose` is the transposed map, both ways
    round.
    """
    draw, size = Draw(seed), heads * (2 * half + rest)
    x, dy, cos, sin = draw(b, t, size), draw(b, t, size), draw(b, t, 2 * half), draw(b, t, 2 * half)
    (dx,) = torch.autograd.grad(rotary(x, cos, sin, heads, pairing, transpose), x, dy)
    assert error(rotary(dy, cos, sin, heads, pairing, not transpose), dx) < LIMIT


def test_partners() -> None:
    x = torch.arange(6)
    assert partner(x, 6, "half").tolist() == [3, 4, 5, 0, 1, 2]
    assert partner(x, 6, "interleaved").tolist() == [1, 0, 3, 2, 5, 4]


@given(batches, st.integers(1, 5), st.integers(1, 9), st.integers(1, 20), seeds)
def test_rows_of_lengths(b: int, rows: int, first: int, most: int, seed: int) -> None:
    """Row 0 up to the first length, the last row from the last one on."""
    draw = Draw(seed)
    table = draw(rows, 4)
    length = torch.randint(1, most + 1, (b, 1), generator=draw.generator)
    found = at_length(table, length, first)
    assert found.shape == (b, 1, 4)
    for n, each in enumerate(length[:, 0].tolist()):
        known = dict(enumerate(table, first))
        assert torch.equal(found[n, 0], known[min(max(each, first), first + rows - 1)])


@given(batches, lengths, st.sampled_from(WAVES), seeds)
def test_waves(b: int, t: int, function: str, seed: int) -> None:
    """Real and imaginary part of a e^(i p f)."""
    draw = Draw(seed)
    frequency, amplitude = draw(b, 1, 6), draw(b, 1, 6)
    positions = torch.randint(0, 50, (b, t), generator=draw.generator)
    found = wave(frequency, amplitude, positions, function)
    for n in range(b):
        for i in range(t):
            whole = torch.exp(1j * float(positions[n, i]) * frequency[n, 0]) * amplitude[n, 0]
            assert error(found[n, i], whole.real if function == "cos" else whole.imag) < LIMIT


@given(batches, lengths, st.integers(1, 8), seeds)
def test_window(b: int, t: int, window: int, seed: int) -> None:
    """The last `window` keys of those that were seen; a query that sees none of them sees
    itself.
    """
    seen = torch.rand(b, 1, t, t, generator=Draw(seed).generator) < 0.5
    seen = seen & torch.ones(t, t, dtype=torch.bool).tril()
    before, found = seen.clone(), window_mask(seen, window)
    assert torch.equal(seen, before)
    for n in range(b):
        for i in range(t):
            near = [j for j in range(t) if bool(seen[n, 0, i, j]) and i - j < window] or [i]
            assert found[n, 0, i].nonzero().flatten().tolist() == near


@pytest.mark.parametrize("window", [1, 4, 100])
def test_window_of_a_causal_mask(window: int) -> None:
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    distance = torch.arange(7)[:, None] - torch.arange(7)
    assert torch.equal(window_mask(causal, window)[0, 0], (distance >= 0) & (distance < window))
