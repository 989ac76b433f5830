"""tintc.runtime.backends.transformer.modules.activation against tintc.ir.ops.activation and
torch.autograd.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.around import F64, Around, apply, arounds, assert_same, cells, in_float32
from tests.support.shapes import Draw, widths
from tests.support.tolerances import DIFFERENCE_FLOAT32, HALF, error
from tintc.ir.ops.activation import KINDS, activation_backward, activation_forward
from tintc.runtime.backends.transformer.modules.activation import (
    ActivationBackward,
    ActivationBackwardExact,
    ActivationForward,
)
from tintc.runtime.backends.transformer.modules.parts import Range, position_code, read

kinds = st.sampled_from(KINDS)
moderate = settings(max_examples=50)


@given(arounds(), kinds, widths, st.integers(1, 5), st.sampled_from([0.1, 1.0, 6.0]))
@moderate
def test_forward(at: Around, kind: str, size: int, d: int, spread: float) -> None:
    y, x = at.range(size), at.range(size)
    stream, code = at.stream(spread), position_code(1, d, F64)
    found = apply(
        ActivationForward(width=d, kind=kind), stream, code, x, y, writes=cells(stream, y)
    )
    assert_same(read(found, y), activation_forward(read(stream, x), kind), (stream,))


@given(arounds(), kinds, widths, st.integers(1, 5), st.sampled_from([3.0, 1000.0]))
@moderate
def test_first_order_backward(at: Around, kind: str, size: int, d: int, scale: float) -> None:
    """With a small scale some ReLUs change sign between x and x + dy/N."""
    dy, dx, x = at.range(size), at.range(size), at.range(size)
    stream, code = at.stream(), position_code(1, d, F64)
    layer = ActivationBackward(size=size, width=d, kind=kind, scale=scale)
    found = apply(layer, stream, code, dy, x, dx, writes=cells(stream, dx))
    expected = activation_backward(read(stream, dy), read(stream, x), kind, "first_order", scale)
    assert_same(read(found, dx), expected, (stream,), kind="first-order activation")


@given(arounds(), kinds, widths, st.integers(1, 5))
@moderate
def test_exact_backward(at: Around, kind: str, size: int, d: int) -> None:
    dx, x, dy = at.range(size), at.range(size), at.range(size)
    stream, code = at.stream(), position_code(1, d, F64)
    layer = ActivationBackwardExact(size=size, width=d, kind=kind)
    found = apply(layer, stream, code, dy, x, dx, writes=cells(stream, dx))
    expected = activation_backward(read(stream, dy), read(stream, x), kind, "exact", 1000.0)
    assert_same(read(found, dx), expected, (stream,), kind="exact activation")
    value = read(stream, x).detach().requires_grad_()
    (by_autograd,) = torch.autograd.grad(activation_forward(value, kind), value, read(stream, dy))
    assert error(read(found, dx), by_autograd) < 1e-9


def test_relu_at_zero() -> None:
    """Exact: 0. First order: what a step of dy / N crosses."""
    stream = torch.tensor([[[0.0, 0.0, 2.0, -2.0, 9.0, 9.0]]], dtype=F64)
    x, dy, dx = Range(0, 2, None), Range(2, 4, None), Range(4, 6, None)
    code = position_code(1, 2, F64)
    exact = ActivationBackwardExact(size=2, width=2, kind="relu")(stream.clone(), code, dy, x, dx)
    first = ActivationBackward(size=2, width=2, kind="relu", scale=1000.0)(
        stream.clone(), code, dy, x, dx
    )
    assert exact[0, 0, 4:].tolist() == [0.0, 0.0]
    assert error(first[0, 0, 4:], torch.tensor([2.0, 0.0], dtype=F64)) < 1e-15


def problem(dtype: torch.dtype, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """(stream, x, dy), dy of that size, rounded to the dtype."""
    draw = Draw(1)
    x, dy = (
        value.detach().to(dtype).double() for value in (draw(1, 50, 80), draw(1, 50, 80) * size)
    )
    return torch.cat([x, dy], -1), x, dy


X, DY = Range(0, 80, None), Range(80, 160, None)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("gradient", ["first_order", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_its_digits(kind: str, gradient: str, size: float) -> None:
    stream, x, dy = problem(torch.float32, size)
    sizes = {"size": 80, "width": 8, "kind": kind}
    layer = (
        ActivationBackwardExact(**sizes)
        if gradient == "exact"
        else ActivationBackward(**sizes, scale=1000.0)
    )
    found = in_float32(layer, stream, position_code(2, 8, F64), DY, X, DY)[..., 80:].double()
    expected = activation_backward(dy, x, kind, gradient, 1000.0)
    assert float((found - expected).abs().max() / expected.abs().max()) < DIFFERENCE_FLOAT32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    stream, x, dy = problem(dtype, 1.0)
    low, code = stream.to(dtype), position_code(2, 8, dtype)
    found = ActivationForward(width=8, kind=kind).to(dtype)(low.clone(), code, X, DY)[..., 80:]
    assert found.dtype == dtype
    assert error(found, activation_forward(x, kind)) < HALF[dtype]
    for gradient in ("first_order", "exact"):
        sizes = {"size": 80, "width": 8, "kind": kind}
        layer = (
            ActivationBackwardExact(**sizes)
            if gradient == "exact"
            else ActivationBackward(**sizes, scale=1000.0)
        )
        found = layer.to(dtype)(low.clone(), code, DY, X, DY)[..., 80:]
        assert found.dtype == dtype
        assert error(found, activation_backward(dy, x, kind, gradient, 1000.0)) < HALF[dtype]
