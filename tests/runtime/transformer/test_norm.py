"""tintc.runtime.backends.transformer.modules.norm against tintc.ir.ops.norm, torch.autograd and the
difference written out.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.around import (
    F64,
    Around,
    Held,
    apply,
    arounds,
    assert_same,
    cells,
    in_float32,
    vectors,
)
from tests.support.shapes import Draw, shared
from tests.support.tolerances import DIFFERENCE_FLOAT32, HALF, NAIVE_DIFFERENCE, PRIMITIVE, error
from tintc.ir.layout import Range as Span
from tintc.ir.layout import Tile
from tintc.ir.ops.norm import norm_backward, norm_descent, norm_forward
from tintc.runtime.backends.transformer.modules.norm import (
    NormBackward,
    NormBackwardExact,
    NormDescent,
    NormForward,
)
from tintc.runtime.backends.transformer.modules.parts import Range, read
from tintc.runtime.backends.transformer.pages import read_tile

KINDS = ["layer", "rms"]
kinds = st.sampled_from(KINDS)
pieces = st.sampled_from([1, 1, 2, 3])
offsets = st.sampled_from([0.0, 1.0])
scales = st.sampled_from([3.0, 1000.0])
moderate = settings(max_examples=50)


def written_out(x: Tensor, kind: str, eps: float, h: int) -> Tensor:
    """f of TINT.md section 2, of each of h pieces."""
    found = []
    for piece in x.chunk(h, -1):
        c = piece - piece.mean(-1, keepdim=True) if kind == "layer" else piece
        found.append(c / torch.sqrt(eps + (c * c).mean(-1, keepdim=True)))
    return torch.cat(found, -1)


def gain_of(page: Tensor, held: Held) -> Tensor:
    return read_tile(page, held.tile).squeeze(-1)


def gained(x: Tensor, gamma: Tensor | None, h: int, offset: float) -> Tensor:
    """(gamma + offset) x, with one gamma for all pieces."""
    return x if gamma is None else x * (torch.cat([gamma] * h, -1) + offset).unsqueeze(-2)


@given(
    arounds(), vectors(), shared, st.sampled_from([*KINDS, "scale"]), st.booleans(), pieces, offsets
)
@moderate
def test_forward(
    at: Around,
    drawn: tuple[Held, int],
    is_shared: bool,
    kind: str,
    gain: bool,
    h: int,
    offset: float,
) -> None:
    (held, each), x, y = drawn, at.range(h * drawn[1]), at.range(h * drawn[1])
    stream, page = at.stream(), at.page(is_shared, held.tokens, held.hidden)
    layer = NormForward(
        size=h * each, width=held.width, eps=1e-5, kind=kind, gain=gain, pieces=h, offset=offset
    )
    of_gain = (page, held.place) if gain else (None, None)
    found = apply(layer, stream, held.code, *of_gain, x, y, writes=cells(stream, y))
    expected = norm_forward(
        read(stream, x), gain_of(page, held) if gain else None, None, 1e-5, kind, h, offset
    )
    # Of one number layer normalization is constant and its gradient a difference of large terms,
    # over eps.
    assert_same(read(found, y), expected, (stream, page), kind="norm")


@given(arounds(), vectors(), shared, pieces, offsets, st.sampled_from(["exact", "first_order"]))
@moderate
def test_a_learned_scale_is_its_own_backward(
    at: Around, drawn: tuple[Held, int], is_shared: bool, h: int, offset: float, gradient: str
) -> None:
    (held, each), dx, dy, x = drawn, *(at.range(h * drawn[1]) for _ in range(3))
    stream, page = at.stream(), at.page(is_shared, held.tokens, held.hidden)
    layer = NormForward(
        size=h * each, width=held.width, eps=0.0, kind="scale", gain=True, pieces=h, offset=offset
    )
    found = apply(layer, stream, held.code, page, held.place, dy, dx, writes=cells(stream, dx))
    expected = norm_backward(
        read(stream, dy),
        read(stream, x),
        gain_of(page, held),
        0.0,
        "scale",
        h,
        offset,
        gradient,
        3.0,
    )
    assert_same(read(found, dx), expected, (stream, page), kind="learned scale")


@given(arounds(), vectors(), shared, kinds, st.booleans(), scales, pieces, offsets)
@moderate
def test_first_order_backward(
    at: Around,
    drawn: tuple[Held, int],
    is_shared: bool,
    kind: str,
    gain: bool,
    scale: float,
    h: int,
    offset: float,
) -> None:
    held, size = drawn[0], h * drawn[1]
    dx, dy, x = at.range(size), at.range(size), at.range(size)
    stream, page = at.stream(), at.page(is_shared, held.tokens, held.hidden)
    layer = NormBackward(
        size=size,
        width=held.width,
        eps=0.1,
        kind=kind,
        gain=gain,
        scale=scale,
        pieces=h,
        offset=offset,
    )
    of_gain = (page, held.place) if gain else (None, None)
    found = apply(layer, stream, held.code, *of_gain, dy, x, dx, writes=cells(stream, dx))
    gamma = gain_of(page, held) if gain else None
    expected = norm_backward(
        read(stream, dy), read(stream, x), gamma, 0.1, kind, h, offset, "first_order", scale
    )
    assert_same(read(found, dx), expected, (stream, page), kind="first-order norm")
    g = gained(read(stream, dy), gamma, h, offset)
    naive = scale * (
        written_out(read(stream, x) + g / scale, kind, 0.1, h)
        - written_out(read(stream, x), kind, 0.1, h)
    )
    assert error(read(found, dx), naive) < NAIVE_DIFFERENCE


@given(arounds(), vectors(), shared, kinds, st.booleans(), pieces, offsets)
@moderate
def test_exact_backward(
    at: Around,
    drawn: tuple[Held, int],
    is_shared: bool,
    kind: str,
    gain: bool,
    h: int,
    offset: float,
) -> None:
    held, size = drawn[0], h * drawn[1]
    x, dx, dy = at.range(size), at.range(size), at.range(size)
    stream, page = at.stream(), at.page(is_shared, held.tokens, held.hidden)
    layer = NormBackwardExact(
        size=size, width=held.width, eps=0.1, kind=kind, gain=gain, pieces=h, offset=offset
    )
    of_gain = (page, held.place) if gain else (None, None)
    found = apply(layer, stream, held.code, *of_gain, dy, x, dx, writes=cells(stream, dx))
    gamma = gain_of(page, held) if gain else None
    expected = norm_backward(
        read(stream, dy), read(stream, x), gamma, 0.1, kind, h, offset, "exact", 1000.0
    )
    assert_same(read(found, dx), expected, (stream, page), kind="exact norm")
    value = read(stream, x).detach().requires_grad_()
    y = gained(written_out(value, kind, 0.1, h), gamma, h, offset)
    (by_autograd,) = torch.autograd.grad(y, value, read(stream, dy))
    assert error(read(found, dx), by_autograd) < 1e-9


@given(arounds(), vectors(), shared, st.sampled_from([*KINDS, "scale"]), pieces)
@moderate
def test_descent(at: Around, drawn: tuple[Held, int], is_shared: bool, kind: str, h: int) -> None:
    """The gain alone moves, in each sequence's own page, by all pieces that share it."""
    (held, each), x, dy = drawn, at.range(h * drawn[1]), at.range(h * drawn[1])
    stream, page = at.stream(), at.page(is_shared, held.tokens, held.hidden)
    inner_lr = torch.tensor(0.37, dtype=F64, requires_grad=True)
    layer = NormDescent(size=h * each, width=held.width, eps=0.1, kind=kind, pieces=h)
    found = apply(
        layer, page, held.code, stream, held.place, dy, x, inner_lr, writes=cells(page, held.place)
    )
    assert found.shape == (at.batch, held.tokens, held.hidden)
    expected = norm_descent(
        gain_of(page, held), read(stream, dy), read(stream, x), 0.1, kind, h, inner_lr
    )
    assert_same(gain_of(found, held), expected, (page, stream, inner_lr))


def problem(dtype: torch.dtype, size: float, h: int = 1) -> tuple[Held, Tensor, Tensor, Tensor]:
    """A norm of 64 numbers in h pieces: its place, and x, dy (of that size), gamma, rounded to the
    dtype.
    """
    draw, each = Draw(0), 64 // h
    x, dy, gamma = (
        value.detach().to(dtype).double()
        for value in (draw(4, 32, 64), draw(4, 32, 64) * size, draw(each))
    )
    return (
        Held(Tile(0, Span(0, each), Span(0, 1), Span(1, 2), Span(3, 3 + each), 1), 4, 16, 70),
        x,
        dy,
        gamma,
    )


def stream_and_page(held: Held, x: Tensor, dy: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    page = torch.zeros(held.tokens, held.hidden, dtype=F64)
    page[1, 3 : 3 + len(gamma)] = gamma
    return torch.cat([torch.zeros_like(x), dy, x], -1), page


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", ["first_order", "exact"])
@pytest.mark.parametrize("h", [1, 2])
def test_float32_keeps_its_digits(kind: str, size: float, gradient: str, h: int) -> None:
    """The difference in float32 is as good as in float64 (TINT.md section 4, item 7), constants
    held in float32 included.
    """
    held, x, dy, gamma = problem(torch.float32, size, h)
    stream, page = stream_and_page(held, x, dy, gamma)
    sizes = {
        "size": 64,
        "width": held.width,
        "eps": 1e-5,
        "kind": kind,
        "gain": True,
        "pieces": h,
        "offset": h - 1.0,
    }
    layer = (
        NormBackwardExact(**sizes) if gradient == "exact" else NormBackward(**sizes, scale=1000.0)
    )
    ranges = Range(64, 128, None), Range(128, 192, None), Range(0, 64, None)
    found = in_float32(layer, stream, held.code, page, held.place, *ranges)[..., :64].double()
    expected = norm_backward(dy, x, gamma, 1e-5, kind, h, h - 1.0, gradient, 1000.0)
    assert float((found - expected).abs().max() / expected.abs().max()) < DIFFERENCE_FLOAT32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    held, x, dy, gamma = problem(dtype, 1.0)
    stream, page = (value.to(dtype) for value in stream_and_page(held, x, dy, gamma))
    code, a, b, c = (
        held.code.to(dtype),
        Range(64, 128, None),
        Range(128, 192, None),
        Range(0, 64, None),
    )
    sizes = {"size": 64, "width": held.width, "eps": 1e-5, "kind": kind}
    forward, backward = (
        NormForward(**sizes, gain=True).to(dtype),
        NormBackward(**sizes, gain=True, scale=1000.0).to(dtype),
    )
    found = forward(stream.clone(), code, page, held.place, b, c)[..., :64]
    assert found.dtype == dtype
    assert error(found, norm_forward(x, gamma, None, 1e-5, kind, 1, 0.0)) < HALF[dtype]
    found = backward(stream.clone(), code, page, held.place, a, b, c)[..., :64]
    assert found.dtype == dtype
    assert (
        error(found, norm_backward(dy, x, gamma, 1e-5, kind, 1, 0.0, "first_order", 1000.0))
        < HALF[dtype]
    )


def test_float32_descent() -> None:
    held, x, dy, gamma = problem(torch.float32, 1.0)
    stream, page = stream_and_page(held, x, dy, gamma)
    inner_lr = torch.tensor(0.37, dtype=F64)
    layer = NormDescent(size=64, width=held.width, eps=1e-5, kind="layer")
    found = in_float32(
        layer,
        page,
        held.code,
        stream,
        held.place,
        Range(64, 128, None),
        Range(128, 192, None),
        inner_lr,
    )
    expected = norm_descent(gamma, dy, x, 1e-5, "layer", 1, inner_lr)
    assert error(found[:, 1, 3:67], expected) < PRIMITIVE[torch.float32]
