"""tintc.runtime.primitives.attention against torch.autograd over attention written out, grouped heads included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.runtime.shapes import Draw, batches, lengths, seeds
from tests.tolerances import HALF, PRIMITIVE, error
from tintc.runtime.primitives.attention import attention_backward_full, attention_backward_value, attention_forward

LIMIT = PRIMITIVE[torch.float64]
heads = st.tuples(st.integers(1, 3), st.integers(1, 3))  # (key/value heads, query heads of each)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, h: int, g: int, scale: float, *, constant: bool = False) -> Tensor:
    """Head by head, so that nothing is shared with the primitive."""
    e, out = q.shape[-1] // h, []
    for head in range(h):
        group = head // (h // g)
        q_h = q[..., head * e : (head + 1) * e]
        k_h, v_h = (x.unflatten(-1, (g, -1))[..., group, :] for x in (k, v))
        scores = torch.einsum("bie,bje->bij", q_h, k_h) * scale
        p = torch.where(mask[:, 0], scores, -torch.inf).softmax(-1)
        out.append((p.detach() if constant else p) @ v_h)
    return torch.cat(out, -1)


def random_mask(draw: Draw, b: int, t: int) -> Tensor:
    """(B, 1, T, T), within the causal mask, at least one key for every query."""
    seen = torch.rand(b, 1, t, t, generator=draw.generator) < 0.7
    return (seen & torch.ones(t, t, dtype=torch.bool).tril()) | torch.eye(t, dtype=torch.bool)


@given(batches, lengths, heads, st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.3, 1.0]), st.booleans(), seeds)
def test_forward_and_full_backward(
    b: int, t: int, counts: tuple[int, int], e: int, e_v: int, scale: float, one_mask: bool, seed: int
) -> None:
    """Keys and values may differ in width; one mask may serve all sequences."""
    draw, (g, h) = Draw(seed), (counts[0], counts[0] * counts[1])
    q, k, v = draw(b, t, h * e), draw(b, t, g * e), draw(b, t, g * e_v)
    mask = random_mask(draw, 1 if one_mask else b, t)
    expected = written_out(q, k, v, mask.expand(b, 1, t, t), h, g, scale)
    assert error(attention_forward(q, k, v, mask, h, g, scale), expected) < LIMIT
    do = draw(b, t, h * e_v)
    found = attention_backward_full(do, q, k, v, mask, h, g, scale)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (q, k, v), do), strict=True):
        assert error(gradient, wanted) < LIMIT


@given(batches, lengths, heads, st.integers(1, 5), seeds)
def test_value_backward(b: int, t: int, counts: tuple[int, int], e: int, seed: int) -> None:
    draw, (g, h) = Draw(seed), (counts[0], counts[0] * counts[1])
    q, k, v, do, mask = draw(b, t, h * e), draw(b, t, g * e), draw(b, t, g * e), draw(b, t, h * e), random_mask(draw, b, t)
    (dv,) = torch.autograd.grad(written_out(q, k, v, mask, h, g, 0.5, constant=True), v, do)
    found = attention_backward_value(do, q, k, mask, h, g, 0.5)
    assert error(found, dv) < LIMIT
    assert error(found, attention_backward_full(do, q, k, v, mask, h, g, 0.5)[2]) < LIMIT


@given(batches, st.integers(2, 7), seeds)
def test_causal(b: int, t: int, seed: int) -> None:
    """No result depends on a later key or value, and no gradient at a query reaches a later one."""
    draw = Draw(seed)
    mask = torch.ones(1, 1, t, t, dtype=torch.bool).tril()
    q, k, v, do = (draw(b, t, 4) for _ in range(4))
    other_k, other_v = (torch.cat([x[:, :-1], x[:, -1:] + 1], 1) for x in (k, v))
    before, after = attention_forward(q, k, v, mask, 2, 2, 1.0), attention_forward(q, other_k, other_v, mask, 2, 2, 1.0)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    first_only = do * (torch.arange(t) == 0)[:, None]
    for gradient in attention_backward_full(first_only, q, k, v, mask, 2, 2, 1.0):
        assert float(gradient[:, 1:].detach().abs().max()) == 0


@given(batches, lengths, seeds, st.floats(-3, 3))
def test_keys_may_shift_together(b: int, t: int, seed: int, shift: float) -> None:
    """A vector added to all keys adds the same to each query's scores: nothing changes, and dk sums to zero."""
    draw = Draw(seed)
    q, k, v, do, mask = *(draw(b, t, 6) for _ in range(4)), random_mask(draw, b, t)
    same = attention_forward(q, k + shift, v, mask, 3, 3, 0.7)
    assert error(same, attention_forward(q, k, v, mask, 3, 3, 0.7)) < LIMIT
    dk = attention_backward_full(do, q, k, v, mask, 3, 3, 0.7)[1]
    assert float(dk.detach().sum(1).abs().max()) < 1e-10


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays(dtype: torch.dtype) -> None:
    draw = Draw(0)
    q, k, v, do = (draw(2, 9, 12).to(dtype) for _ in range(4))
    mask = random_mask(draw, 2, 9)
    wide = [x.double() for x in (q, k, v, do)]
    found = [
        attention_forward(q, k, v, mask, 3, 3, 0.5),
        attention_backward_value(do, q, k, mask, 3, 3, 0.5),
        *attention_backward_full(do, q, k, v, mask, 3, 3, 0.5),
    ]
    expected = [
        attention_forward(*wide[:3], mask, 3, 3, 0.5),
        attention_backward_value(wide[3], *wide[:2], mask, 3, 3, 0.5),
        *attention_backward_full(wide[3], *wide[:3], mask, 3, 3, 0.5),
    ]
    for low, high in zip(found, expected, strict=True):
        assert low.dtype == dtype
        assert error(low, high) < HALF[dtype]
