"""tintc.runtime.backends.transformer.modules.attention against tintc.ir.ops.attention: grouped
heads, values of another width, any mask.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.around import F64, Around, apply, arounds, assert_same, cells, in_float32
from tests.support.shapes import shared
from tests.support.tolerances import PRIMITIVE, error
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_backward_value,
    attention_forward,
)
from tintc.runtime.backends.transformer.modules.attention import (
    AttentionBackwardFull,
    AttentionBackwardValue,
    AttentionForward,
)
from tintc.runtime.backends.transformer.modules.parts import Range, position_code, read

heads = st.tuples(st.integers(1, 3), st.integers(1, 3))  # (key/value heads, query heads of each)
moderate = settings(max_examples=40)


def mask_of(at: Around, one: bool) -> Tensor:
    """(B or 1, 1, n, n), within the causal mask, at least one key for every query."""
    n = at.used
    seen = torch.rand(1 if one else at.batch, 1, n, n, generator=at.draw.generator) < 0.7
    return (seen & torch.ones(n, n, dtype=torch.bool).tril()) | torch.eye(n, dtype=torch.bool)


def sizes_of(
    counts: tuple[int, int],
    e: int,
    e_v: int,
    scale: float,
    *,
    has_bias: bool = False,
    softcap: float = 0.0,
) -> dict[str, float]:
    g, h = counts[0], counts[0] * counts[1]
    sizes = {
        "queries": h * e,
        "keys": g * e,
        "values": g * e_v,
        "width": 3,
        "heads": h,
        "kv_heads": g,
        "scale": scale,
    }
    return {**sizes, "softcap": softcap, "bias": has_bias}


@dataclass(frozen=True)
class Case:
    """Heads (key/value heads, query heads of each), head widths of keys and of values, and how
    scores become probabilities.
    """

    counts: tuple[int, int]
    e: int
    e_v: int
    scale: float
    has_bias: bool
    softcap: float

    def widths(self, *names: str) -> list[int]:
        """Coordinates of q or dq, k or dk, v or dv, o or do."""
        g, h = self.counts[0], self.counts[0] * self.counts[1]
        found = {"q": h * self.e, "k": g * self.e, "v": g * self.e_v, "o": h * self.e_v}
        return [found[name] for name in names]

    def bias_at(self, at: Around) -> Range | None:
        return at.range(self.counts[0] * self.counts[1]) if self.has_bias else None

    @property
    def sizes(self) -> dict[str, float]:
        return sizes_of(
            self.counts, self.e, self.e_v, self.scale, has_bias=self.has_bias, softcap=self.softcap
        )

    def how(
        self, stream: Tensor, bias: Range | None
    ) -> tuple[Tensor | None, int, int, float, float]:
        """Arguments of a primitive behind the mask."""
        of_keys = None if bias is None else read(stream, bias)
        return of_keys, self.counts[0] * self.counts[1], self.counts[0], self.scale, self.softcap


@st.composite
def cases(draw: st.DrawFn) -> Case:
    e, e_v = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Case(
        draw(heads),
        e,
        e_v,
        draw(st.sampled_from([0.3, 1.0])),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.0, 1.5])),
    )


@given(arounds(), cases(), shared)
@moderate
def test_forward(at: Around, case: Case, one: bool) -> None:
    o, q, k, v = (at.range(size) for size in case.widths("o", "q", "k", "v"))
    bias = case.bias_at(at)
    stream, code, mask = at.stream(), position_code(2, 3, F64), mask_of(at, one)
    found = apply(
        AttentionForward(**case.sizes),
        stream,
        code,
        mask,
        bias,
        q,
        k,
        v,
        o,
        writes=cells(stream, o),
    )
    expected = attention_forward(
        read(stream, q), read(stream, k), read(stream, v), mask, *case.how(stream, bias)
    )
    assert_same(read(found, o), expected, (stream,), kind="attention")


@given(arounds(), cases(), shared)
@moderate
def test_value_backward(at: Around, case: Case, one: bool) -> None:
    bias = case.bias_at(at)
    q, do, k, dv = (at.range(size) for size in case.widths("q", "o", "k", "v"))
    stream, code, mask = at.stream(), position_code(2, 3, F64), mask_of(at, one)
    found = apply(
        AttentionBackwardValue(**case.sizes),
        stream,
        code,
        mask,
        bias,
        do,
        q,
        k,
        dv,
        writes=cells(stream, dv),
    )
    expected = attention_backward_value(
        read(stream, do), read(stream, q), read(stream, k), mask, *case.how(stream, bias)
    )
    assert_same(read(found, dv), expected, (stream,), kind="attention")


@given(arounds(), cases(), shared, st.tuples(*[st.booleans()] * 3))
@moderate
def test_full_backward(at: Around, case: Case, one: bool, wanted: tuple[bool, bool, bool]) -> None:
    """Only the results that have a reader are written."""
    q, do, k, v = (at.range(size) for size in case.widths("q", "o", "k", "v"))
    results = tuple(
        at.range(size) if is_read else None
        for size, is_read in zip(case.widths("q", "k", "v"), wanted, strict=True)
    )
    bias = case.bias_at(at)
    stream, code, mask = at.stream(), position_code(2, 3, F64), mask_of(at, one)
    written = cells(stream, *(where for where in results if where is not None))
    found = apply(
        AttentionBackwardFull(**case.sizes),
        stream,
        code,
        mask,
        bias,
        do,
        q,
        k,
        v,
        results,
        writes=written,
    )
    args = tuple(read(stream, where) for where in (do, q, k, v))
    for where, expected in zip(
        results, attention_backward_full(*args, mask, *case.how(stream, bias)), strict=True
    ):
        if where is not None:
            assert_same(read(found, where), expected, (stream,), kind="attention")


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("group", [1, 3])
def test_full_backward_is_autograds(group: int, softcap: float) -> None:
    at = Around(0, 2, 6, None)
    q, do, k, v, dq, dk, dv = (
        at.range(size) for size in (2 * group * 3, 2 * group * 4, 6, 8, 2 * group * 3, 6, 8)
    )
    stream, mask = at.stream(), mask_of(at, False)
    leaves = tuple(read(stream, where).detach().requires_grad_() for where in (q, k, v))
    parts = [
        x.unflatten(-1, (2, -1, size)).transpose(1, 2)
        for x, size in zip(leaves, (3, 3, 4), strict=True)
    ]
    scores = torch.einsum("bgtue,bgsze->bgtus", *parts[:2]) * 0.3
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    probabilities = scores.masked_fill(~mask[..., None, :], -torch.inf).softmax(-1)
    o = torch.einsum("bgtus,bgszf->bgtuf", probabilities, parts[2]).transpose(1, 2).flatten(2)
    expected = torch.autograd.grad(o, leaves, read(stream, do))
    layer = AttentionBackwardFull(**sizes_of((2, group), 3, 4, 0.3, softcap=softcap))
    found = layer(stream, position_code(2, 3, F64), mask, None, do, q, k, v, (dq, dk, dv))
    for where, gradient in zip((dq, dk, dv), expected, strict=True):
        assert error(read(found, where), gradient) < 1e-9


@pytest.mark.parametrize(("has_bias", "softcap"), [(False, 0.0), (True, 0.0), (True, 1.5)])
def test_float32(has_bias: bool, softcap: float) -> None:
    at, case = Around(0, 2, 7, None), Case((2, 2), 3, 3, 0.3, has_bias, softcap)
    q, k, v, o, dq, dk, dv = (at.range(size) for size in (12, 6, 6, 12, 12, 6, 6))
    bias = case.bias_at(at)
    stream, code, mask = at.stream(), position_code(2, 3, F64), mask_of(at, False)
    how = case.how(stream, bias)
    args = tuple(read(stream, where) for where in (o, q, k, v))
    limit = PRIMITIVE[torch.float32]
    found = in_float32(AttentionForward(**case.sizes), stream, code, mask, bias, q, k, v, o)
    assert error(read(found, o), attention_forward(*args[1:], mask, *how)) < limit
    found = in_float32(
        AttentionBackwardFull(**case.sizes), stream, code, mask, bias, o, q, k, v, (dq, dk, dv)
    )
    for where, expected in zip(
        (dq, dk, dv), attention_backward_full(*args, mask, *how), strict=True
    ):
        assert error(read(found, where), expected) < limit


def test_later_tokens_are_not_seen() -> None:
    """Of the tokens beyond n nothing is read: any numbers there give the same result to the bit."""
    at = Around(0, 2, 7, 4)
    q, k, v, o = (at.range(size) for size in (6, 6, 6, 6))
    stream, mask = at.stream().detach(), mask_of(at, True)
    layer, code = AttentionForward(**sizes_of((2, 1), 3, 3, 1.0)), position_code(2, 3, F64)
    other = stream.clone()
    other[:, 4:] = float("nan")
    first, second = (layer(x.clone(), code, mask, None, q, k, v, o) for x in (stream, other))
    assert torch.equal(read(first, o), read(second, o))
    assert read(first, Range(o.start, o.stop, 4)).isfinite().all()
