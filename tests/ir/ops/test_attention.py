"""tintc.ir.ops.attention against torch.autograd over attention written out, grouped heads
included.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, batches, lengths, seeds
from tests.support.tolerances import HALF, PRIMITIVE, error
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
    flash_backward,
    flash_forward,
    join_rows,
    last_keys,
    split_rows,
)

LIMIT = PRIMITIVE[torch.float64]
heads = st.tuples(st.integers(1, 3), st.integers(1, 3))  # (key/value heads, query heads of each)


softcaps = st.sampled_from([0.0, 0.0, 1.5])
PLAIN = (None, 2, 2, 1.0, 0.0)  # no bias, two heads, no soft-cap


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    h: int,
    g: int,
    scale: float,
    softcap: float,
    *,
    constant: bool = False,
) -> Tensor:
    """Head by head, so that nothing is shared with the primitive."""
    e, out = q.shape[-1] // h, []
    for head in range(h):
        group = head // (h // g)
        q_h = q[..., head * e : (head + 1) * e]
        k_h, v_h = (x.unflatten(-1, (g, -1))[..., group, :] for x in (k, v))
        scores = torch.einsum("bie,bje->bij", q_h, k_h) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, None, :, head]
        p = torch.where(mask[:, 0], scores, -torch.inf).softmax(-1)
        out.append((p.detach() if constant else p) @ v_h)
    return torch.cat(out, -1)


def random_mask(draw: Draw, b: int, t: int) -> Tensor:
    """(B, 1, T, T), within the causal mask, at least one key for every query."""
    seen = torch.rand(b, 1, t, t, generator=draw.generator) < 0.7
    return (seen & torch.ones(t, t, dtype=torch.bool).tril()) | torch.eye(t, dtype=torch.bool)


@st.composite
def problems(
    draw: st.DrawFn,
) -> tuple[Draw, dict[str, Tensor], tuple[Tensor, Tensor | None, int, int, float, float]]:
    """(more to draw from, tensors by name, mask, bias, H, G, scale, soft-cap). Keys and values may
    differ in width; one mask may serve all sequences."""
    b, t, e, e_v, random = (
        draw(batches),
        draw(lengths),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
        Draw(draw(seeds)),
    )
    g, each = draw(heads)
    h = g * each
    mask = random_mask(random, 1 if draw(st.booleans()) else b, t)
    bias = random(b, t, h) if draw(st.booleans()) else None
    sizes = {"q": h * e, "k": g * e, "v": g * e_v, "do": h * e_v}
    tensors = {
        name: random(b, t, size, scale=2.0 if name == "q" else 1.0) for name, size in sizes.items()
    }
    return random, tensors, (mask, bias, h, g, draw(st.sampled_from([0.3, 1.0])), draw(softcaps))


@given(problems())
def test_forward_and_full_backward(drawn: Any) -> None:
    _, tensors, (mask, *how) = drawn
    do, *leaves = (tensors[name] for name in ("do", "q", "k", "v"))
    expected = written_out(*leaves, mask.expand(len(do), *mask.shape[1:]), *how)
    assert error(attention_forward(*leaves, mask, *how), expected) < LIMIT
    found = attention_backward_full(do, *leaves, mask, *how)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, leaves, do), strict=True):
        assert error(gradient, wanted) < LIMIT


@given(problems())
def test_value_backward(drawn: Any) -> None:
    _, tensors, (mask, *how) = drawn
    q, k, v, do = (tensors[name] for name in ("q", "k", "v", "do"))
    (dv,) = torch.autograd.grad(
        written_out(q, k, v, mask.expand(len(do), *mask.shape[1:]), *how, constant=True), v, do
    )
    found = attention_backward_value(do, q, k, mask, *how)
    assert error(found, dv) < LIMIT
    assert error(found, attention_backward_full(do, q, k, v, mask, *how)[2]) < LIMIT


@given(batches, lengths, seeds, st.floats(-3, 3), softcaps)
def test_a_bias_that_all_keys_share_changes_nothing(
    b: int, t: int, seed: int, shift: float, softcap: float
) -> None:
    """So a slope times the key's position is all there is to ALiBi, though it speaks of
    distances.
    """
    draw = Draw(seed)
    q, k, v, bias, mask = *(draw(b, t, 6) for _ in range(3)), draw(b, t, 3), random_mask(draw, b, t)
    how = (3, 3, 0.7, softcap)
    same = attention_forward(q, k, v, mask, bias + shift, *how)
    assert error(same, attention_forward(q, k, v, mask, bias, *how)) < LIMIT
    distance = torch.arange(t, dtype=torch.float64)[:, None] - torch.arange(t)
    slopes = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    of_keys = (slopes * torch.arange(t)[:, None]).expand(b, t, 3)
    parts = (x.unflatten(-1, (3, 2)).transpose(1, 2) for x in (q, k, v))
    by_distance = torch.where(mask, -slopes[:, None, None] * distance, -torch.inf)
    expected = (
        F.scaled_dot_product_attention(*parts, attn_mask=by_distance, scale=0.7)
        .transpose(1, 2)
        .flatten(2)
    )
    assert error(attention_forward(q, k, v, mask, of_keys, 3, 3, 0.7, 0.0), expected) < LIMIT


@given(batches, st.integers(2, 7), seeds)
def test_causal(b: int, t: int, seed: int) -> None:
    """No result depends on a later key or value, and no gradient at a query reaches a later one."""
    draw = Draw(seed)
    mask = torch.ones(1, 1, t, t, dtype=torch.bool).tril()
    q, k, v, do = (draw(b, t, 4) for _ in range(4))
    other_k, other_v = (torch.cat([x[:, :-1], x[:, -1:] + 1], 1) for x in (k, v))
    before, after = (
        attention_forward(q, k, v, mask, *PLAIN),
        attention_forward(q, other_k, other_v, mask, *PLAIN),
    )
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    first_only = do * (torch.arange(t) == 0)[:, None]
    for gradient in attention_backward_full(first_only, q, k, v, mask, *PLAIN):
        assert float(gradient[:, 1:].detach().abs().max()) == 0


@given(batches, lengths, seeds, st.floats(-3, 3))
def test_keys_may_shift_together(b: int, t: int, seed: int, shift: float) -> None:
    """A vector added to all keys adds the same to each query's scores: nothing changes, and dk sums
    to zero.
    """
    draw = Draw(seed)
    q, k, v, do, mask = *(draw(b, t, 6) for _ in range(4)), random_mask(draw, b, t)
    same = attention_forward(q, k + shift, v, mask, None, 3, 3, 0.7, 0.0)
    assert error(same, attention_forward(q, k, v, mask, None, 3, 3, 0.7, 0.0)) < LIMIT
    dk = attention_backward_full(do, q, k, v, mask, None, 3, 3, 0.7, 0.0)[1]
    assert float(dk.detach().sum(1).abs().max()) < 1e-10


@pytest.mark.parametrize(("has_bias", "softcap"), [(False, 0.0), (True, 0.0), (True, 1.5)])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays(dtype: torch.dtype, has_bias: bool, softcap: float) -> None:
    draw = Draw(0)
    q, k, v, do = (draw(2, 9, 12).to(dtype) for _ in range(4))
    mask, bias = random_mask(draw, 2, 9), draw(2, 9, 3).to(dtype) if has_bias else None
    wide = [x.double() for x in (q, k, v, do)]
    how = (bias, 3, 3, 0.5, softcap)
    found = [
        attention_forward(q, k, v, mask, *how),
        attention_backward_value(do, q, k, mask, *how),
        *attention_backward_full(do, q, k, v, mask, *how),
    ]
    in_wide = (None if bias is None else bias.double(), *how[1:])
    expected = [
        attention_forward(*wide[:3], mask, *in_wide),
        attention_backward_value(wide[3], *wide[:2], mask, *in_wide),
        *attention_backward_full(wide[3], *wide[:3], mask, *in_wide),
    ]
    for low, high in zip(found, expected, strict=True):
        assert low.dtype == dtype
        assert error(low, high) < HALF[dtype]


def causal_mask(t: int) -> Tensor:
    return torch.ones(1, 1, t, t, dtype=torch.bool).tril()


@given(problems())
def test_no_mask_is_the_causal_one(drawn: Any) -> None:
    _, tensors, (_, bias, *how) = drawn
    q, k, v, do = (tensors[name] for name in ("q", "k", "v", "do"))
    mask = causal_mask(q.shape[1])
    for call, operands in (
        (attention_forward, (q, k, v)),
        (attention_backward_value, (do, q, k)),
        (attention_backward_full, (do, q, k, v)),
    ):
        # The pass leaves a bias its mask: only scores that are written out take both a bias and no
        # mask.
        given_bias = None if call is attention_forward else bias
        found, expected = (call(*operands, m, given_bias, *how) for m in (None, mask))
        pairs = (
            zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        )
        assert all(error(a, b) < LIMIT for a, b in pairs)


@given(batches, lengths, heads, st.integers(1, 5), st.sampled_from([0.3, 1.0]), seeds)
def test_flash(b: int, t: int, groups: tuple[int, int], e: int, scale: float, seed: int) -> None:
    """torch's kernel against the attention that is written out, and against autograd through it;
    grouped queries too.
    """
    draw, g, h = Draw(seed), groups[0], groups[0] * groups[1]
    q, k, v, do = (
        draw(b, t, h * e, scale=2.0),
        draw(b, t, g * e),
        draw(b, t, g * e),
        draw(b, t, h * e),
    )
    o, sums = flash_forward(q.detach(), k.detach(), v.detach(), h, g, scale)
    expected = written_out(q, k, v, causal_mask(t), None, h, g, scale, 0.0)
    assert error(o, expected) < LIMIT
    assert error(o, attention_forward(q, k, v, None, None, h, g, scale, 0.0)) < LIMIT
    keys = k.unflatten(-1, (g, e)).repeat_interleave(h // g, 2)
    scores = torch.einsum("bihe,bjhe->bhij", q.unflatten(-1, (h, e)), keys) * scale
    assert error(sums, scores.masked_fill(~causal_mask(t), -torch.inf).logsumexp(-1)) < LIMIT
    found = flash_backward(do.detach(), q.detach(), k.detach(), v.detach(), o, sums, h, g, scale)
    by_hand = attention_backward_full(do, q, k, v, None, None, h, g, scale, 0.0)
    for result, *others in zip(
        found, torch.autograd.grad(expected, (q, k, v), do), by_hand, strict=True
    ):
        assert all(error(result, other) < LIMIT for other in others)


@pytest.mark.parametrize("dtype", HALF)
def test_flash_in_half_precision(dtype: torch.dtype) -> None:
    draw = Draw(0)
    q, k, v, do = (
        draw(2, 9, 12).to(dtype),
        draw(2, 9, 6).to(dtype),
        draw(2, 9, 6).to(dtype),
        draw(2, 9, 12).to(dtype),
    )
    o, sums = flash_forward(q, k, v, 4, 2, 0.5)
    wide = [x.detach().double() for x in (q, k, v, do)]
    found = (o, *flash_backward(do, q, k, v, o, sums, 4, 2, 0.5))
    plain = (None, None, 4, 2, 0.5, 0.0)
    expected = (
        attention_forward(*wide[:3], *plain),
        *attention_backward_full(wide[3], *wide[:3], *plain),
    )
    for low, high in zip(found, expected, strict=True):
        assert low.dtype == dtype
        assert error(low, high) < HALF[dtype]


def test_rows_of_a_context_come_apart_and_together() -> None:
    """(B, n N, D): the n rows of a context stand one behind the other."""
    rows = torch.arange(2 * 3 * 5 * 4).reshape(6, 5, 4).double()
    contexts = torch.stack([torch.cat([*rows[:3]]), torch.cat([*rows[3:]])])
    assert torch.equal(split_rows(contexts, rows[:, :2]), rows)
    assert torch.equal(join_rows(rows, contexts[..., :1]), contexts)
    one = contexts[:, :3]  # a token of each row
    assert torch.equal(join_rows(split_rows(one, rows), one), one)


def test_last_keys_of_a_mask() -> None:
    mask = torch.ones(1, 1, 3, 7, dtype=torch.bool).tril(4)
    for keys in (3, 5, 7):
        found = last_keys(mask, torch.zeros(2, keys, 4))
        assert torch.equal(found, mask[..., 7 - keys :])
