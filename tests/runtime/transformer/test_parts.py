"""tintc.runtime.backends.transformer.modules.parts: split maps, linear attention, gates and writes,
each against dense matrices or loops.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.around import F64, assert_same
from tests.support.shapes import Draw, batches, lengths, seeds, widths
from tests.support.tolerances import HALF, error
from tintc.runtime.backends.transformer.modules.parts import (
    Gate,
    Layer,
    LinearAttention,
    NarrowAttention,
    Place,
    Range,
    SelfAttention,
    SplitMap,
    blank,
    groups,
    held,
    join,
    mirrored,
    one_hots,
    pattern,
    position_code,
    read,
    repeat_all,
    repeat_each,
    same,
    split,
)

counts = st.integers(1, 4)
moderate = settings(max_examples=40)
DTYPES = [torch.float64, torch.float32, *HALF]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 3), (3, 7)])
def test_position_code(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Prefix token j: one-hot of j, then ones; input tokens: zeros, then ones."""
    code = position_code(tokens, width, dtype)
    assert code.dtype == dtype
    assert code.shape == (tokens + 1, 2 * width)
    assert torch.equal(code[:tokens, :tokens], torch.eye(tokens, dtype=dtype))
    assert not code[tokens, :width].any()
    assert not code[:, tokens:width].any()
    assert bool((code[:, width:] == 1).all())


def dense(weight: Tensor) -> Tensor:
    """The matrix (A E, I E) that a split map's weight stands for."""
    return torch.cat([torch.cat([torch.diag(w) for w in row], 1) for row in weight], 0)


@given(counts, counts, widths, batches, seeds)
@moderate
def test_split_map_is_a_block_matrix(a: int, i: int, e: int, b: int, seed: int) -> None:
    draw = Draw(seed)
    layer, x = SplitMap(draw(a, i, e).detach()), draw(b, 5, i, e)
    assert layer.weight.numel() == a * i * e
    expected = F.linear(x.flatten(-2), dense(layer.weight)).unflatten(-1, (a, e))
    assert_same(layer(x), expected, (x,))
    back = SplitMap(mirrored(layer.weight))
    assert error(dense(back.weight), dense(layer.weight).t()) == 0


@given(counts, counts, widths, seeds)
@moderate
def test_patterns(parts: int, times: int, e: int, seed: int) -> None:
    """Each moves or sums parts, and changes no number on the way."""
    x = Draw(seed)(2, 3, parts, e).detach()
    assert torch.equal(SplitMap(repeat_each(parts, times, e))(x), x.repeat_interleave(times, -2))
    assert torch.equal(SplitMap(repeat_all(parts, times, e))(x), x.repeat(1, 1, times, 1))
    many = Draw(seed)(2, 3, parts * times, e).detach()
    assert (
        error(
            SplitMap(mirrored(repeat_each(parts, times, e)))(many),
            many.unflatten(-2, (parts, times)).sum(-2),
        )
        < 1e-14
    )
    assert (
        error(
            SplitMap(mirrored(repeat_all(parts, times, e)))(many),
            many.unflatten(-2, (times, parts)).sum(-3),
        )
        < 1e-14
    )
    assert torch.equal(SplitMap(same(parts * e))(x), x.flatten(-2).unsqueeze(-2)), (
        "a whole range in one part"
    )
    assert torch.equal(
        SplitMap(repeat_all(parts, times, e)).whole(x.flatten(-2)),
        x.flatten(-2).repeat(1, 1, times),
    )
    pair = SplitMap(pattern([[1.0, 0.5], [1.0, 0.0]], e))(
        torch.stack([x[..., 0, :], x[..., -1, :]], -2)
    )
    assert error(pair, torch.stack([x[..., 0, :] + 0.5 * x[..., -1, :], x[..., 0, :]], -2)) < 1e-15


@given(st.integers(1, 5), st.integers(0, 3), seeds)
def test_one_hots_pick_one_coordinate_each(parts: int, more: int, seed: int) -> None:
    x = Draw(seed)(2, 1, parts + more).detach()
    found = SplitMap(one_hots(parts, parts + more))(x)
    assert torch.equal(
        found,
        torch.stack([F.one_hot(torch.tensor(s), parts + more) * x[:, 0] for s in range(parts)], 1),
    )


@given(widths, st.integers(1, 5), st.integers(0, 3), seeds)
def test_split_groups_and_join(size: int, used: int, more: int, seed: int) -> None:
    x = Draw(seed)(2, 3, size).detach()
    parts = -(-size // used)
    cut = split(x, parts, used)
    assert cut.shape == (2, 3, parts, used)
    assert torch.equal(join(cut, used, size), x)
    assert not cut.flatten(-2)[..., size:].any()
    wide = groups(x, parts, used, used + more)
    assert wide.shape == (2, 3, parts, used + more)
    assert torch.equal(wide[..., :used], cut)
    assert not wide[..., used:].any()
    assert torch.equal(join(wide, used, size), x)


@given(batches, lengths, st.integers(1, 5), counts, widths, st.booleans(), seeds)
@moderate
def test_linear_attention(
    b: int, t: int, j: int, heads: int, e: int, is_shared: bool, seed: int
) -> None:
    """o_t = O sum_j <Q x_t, K y_j> V z_j by loops over heads, with maps of every shape."""
    draw = Draw(seed)
    maps = [draw(heads, 2, e), draw(heads, 1, e), draw(heads, 3, e), draw(2, heads, e)]
    layer = LinearAttention(heads, *(m.detach() for m in maps))
    x, y, z = (
        draw(b, t, 2, e),
        draw.parameter(b, is_shared, j, 1, e),
        draw.parameter(b, is_shared, j, 3, e),
    )
    q, k, v = (
        torch.einsum("aie,...ie->...ae", m.detach(), value)
        for m, value in zip(maps, (x, y, z), strict=False)
    )
    out = []
    for head in range(heads):
        scores = q[..., head, :] @ k[..., head, :].transpose(-1, -2)
        out.append(scores @ v[..., head, :])
    expected = torch.einsum("aie,...ie->...ae", maps[3].detach(), torch.stack(out, -2))
    assert_same(layer(x, y, z), expected, (x, y, z))


@given(batches, lengths, st.integers(1, 5), widths, seeds)
@moderate
def test_narrow_attention(b: int, t: int, j: int, w: int, seed: int) -> None:
    draw = Draw(seed)
    x, y, z = draw(b, t, w), draw(b, j, w), draw(b, j, w)
    assert_same(NarrowAttention(w)(x, y, z), torch.einsum("btw,bjw,bjw->btw", x, y, z), (x, y, z))
    u, v = draw(b, t, w), draw(b, t, w)
    assert_same(NarrowAttention(w, itself=True)(x, u, v), x * u * v, (x, u, v))


@given(
    batches,
    lengths,
    st.integers(1, 5),
    widths,
    counts,
    st.sets(st.sampled_from(["query", "key", "value", "output"])),
    seeds,
)
@moderate
def test_narrow_attention_by_pieces(
    b: int, t: int, j: int, e: int, pieces: int, once: set[str], seed: int
) -> None:
    """What is there once serves every piece; an output that is there once is the sum of all. Four
    maps of W numbers, as ever.
    """
    draw, w = Draw(seed), pieces * e
    x, y, z = (
        draw(b, n, e if name in once else w) for n, name in ((t, "query"), (j, "key"), (j, "value"))
    )
    layer = NarrowAttention(w, pieces=pieces, once=tuple(once))
    full = (
        torch.cat([v] * pieces, -1) if name in once else v
        for v, name in ((x, "query"), (y, "key"), (z, "value"))
    )
    expected = torch.einsum("btw,bjw,bjw->btw", *full)
    expected = sum(expected.split(e, -1)) if "output" in once else expected
    assert_same(layer(x, y, z), expected, (x, y, z))
    assert sum(p.numel() for p in layer.parameters()) == 4 * w


@given(batches, lengths, widths, counts, seeds)
@moderate
def test_self_attention(b: int, t: int, e: int, pieces: int, seed: int) -> None:
    """One head a piece."""
    draw, w = Draw(seed), pieces * e
    x, y, z = draw(b, t, w), draw(b, t, w), draw(b, t, w)
    expected = torch.cat(
        [
            (u * v).mean(-1, keepdim=True) * s
            for u, v, s in zip(*(a.split(e, -1) for a in (x, y, z)), strict=True)
        ],
        -1,
    )
    assert_same(SelfAttention(w, pieces)(x, y, z), expected, (x, y, z))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["inputs", "prefix"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (4, 4), (3, 7)])
def test_gates_are_0_or_1_to_the_bit(
    tokens: int, width: int, add: bool, side: str, dtype: torch.dtype
) -> None:
    """The side that is written keeps its old value or drops it and takes the result; the other
    keeps all and takes nothing.
    """
    keep, take = (
        Layer(width, add=add, side=side).to(dtype).gate(position_code(tokens, width, dtype))
    )
    written = torch.zeros(tokens + 1, 1, dtype=torch.bool)
    written[tokens if side == "inputs" else slice(0, tokens)] = True
    assert torch.equal(keep, torch.where(written, float(add), 1.0).to(dtype))
    assert torch.equal(take, written.to(dtype))


def test_a_gates_size_is_4_d() -> None:
    assert Gate(5, prefix=(1.0, 0.0), inputs=(0.0, 1.0)).weight.numel() == 20


@given(batches, lengths, widths, st.booleans(), st.booleans(), seeds, st.data())
@moderate
def test_write(
    b: int, t: int, size: int, add: bool, recorded: bool, seed: int, data: st.DataObject
) -> None:
    """One range of the first n tokens; in place if torch does not record, of a copy if it does."""
    where = Range(2, 2 + size, data.draw(st.none() | st.integers(1, t)))
    n, draw, code = where.tokens or t, Draw(seed), position_code(2, 3, F64)
    stream = draw(b, t, size + 4)
    if not recorded:
        stream = stream.detach()
    value, before = draw(b, n, size).detach(), stream.detach().clone()
    found = Layer(3, add=add).write(stream, code, where, value)
    expected = before.clone()
    expected[:, :n, 2 : 2 + size] = value + (before[:, :n, 2 : 2 + size] if add else 0)
    assert torch.equal(found.detach(), expected)
    assert torch.equal(stream.detach(), before if recorded else expected)
    assert (found is stream) == (not recorded)


def test_a_result_that_is_recorded_never_lands_in_the_old_stream() -> None:
    stream, code, value = (
        torch.zeros(1, 2, 3, dtype=F64),
        position_code(1, 2, F64),
        torch.ones(1, 2, 1, dtype=F64, requires_grad=True),
    )
    found = Layer(2).write(stream, code, Range(0, 1, None), value)
    assert not stream.any()
    assert found.requires_grad
    with torch.no_grad():
        assert Layer(2).write(stream, code, Range(0, 1, None), value) is stream


@given(batches, st.integers(1, 4), widths, st.booleans(), seeds, st.data())
@moderate
def test_update(b: int, k: int, size: int, is_shared: bool, seed: int, data: st.DataObject) -> None:
    """A place of a page, in a copy that belongs to each sequence."""
    first = data.draw(st.integers(0, k - 1))
    where = Place(first, data.draw(st.integers(first + 1, k)), 1, 1 + size)
    draw, layer = Draw(seed), Layer(k, add=True, side="prefix")
    page = draw.parameter(b, is_shared, k, size + 3).detach()
    before, value = page.clone(), draw(b, where.last - first, size).detach()
    found = layer.update(page, position_code(k, k, F64), where, value)
    expected = page.expand(b, k, size + 3).clone()
    expected[:, first : where.last, 1 : 1 + size] += value
    assert torch.equal(found, expected)
    assert torch.equal(page, before)
    assert torch.equal(held(found, where), expected[:, first : where.last, 1 : 1 + size])


def test_read_copies_while_torch_records() -> None:
    """A later write in place would else change what a backward pass needs."""
    stream = torch.randn(2, 5, 7, dtype=F64)
    found = read(stream, Range(2, 5, 3))
    assert torch.equal(found, stream[:, :3, 2:5])
    assert found.untyped_storage().data_ptr() == stream.untyped_storage().data_ptr()
    recorded = read(stream.requires_grad_(), Range(2, 5, 3))
    assert recorded.untyped_storage().data_ptr() != stream.untyped_storage().data_ptr()


def test_blank() -> None:
    stream = blank(torch.zeros(2, 5, dtype=torch.int64), position_code(1, 2, torch.float32), 9)
    assert torch.equal(stream, torch.zeros(2, 5, 9))


def test_structural_constants_need_no_gradient() -> None:
    for module in (
        SplitMap(same(3)),
        Gate(3, prefix=(1.0, 0.0), inputs=(0.0, 1.0)),
        NarrowAttention(3),
        SelfAttention(3),
    ):
        assert list(module.parameters())
        assert not any(p.requires_grad for p in module.parameters())
