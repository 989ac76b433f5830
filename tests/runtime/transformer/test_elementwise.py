"""tintc.runtime.backends.transformer.modules.elementwise against tintc.ir.ops.elementwise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.around import F64, Around, apply, arounds, assert_same, cells, in_float32
from tests.support.shapes import widths
from tests.support.tolerances import HALF, PRIMITIVE, error
from tintc.ir.ops.elementwise import multiply, residual, scale
from tintc.runtime.backends.transformer.modules.elementwise import Multiply, Residual, Scale
from tintc.runtime.backends.transformer.modules.parts import position_code, read

moderate = settings(max_examples=50)
CODE = position_code(2, 3, F64)


@given(arounds(), widths, st.booleans())
@moderate
def test_residual(at: Around, size: int, in_order: bool) -> None:
    x, y, z = (
        (at.range(size) for _ in range(3))
        if in_order
        else reversed([at.range(size) for _ in range(3)])
    )
    stream = at.stream()
    found = apply(Residual(width=3), stream, CODE, x, y, z, writes=cells(stream, z))
    assert_same(read(found, z), residual(read(stream, x), read(stream, y)), (stream,))


@given(arounds(), widths, st.integers(1, 5), st.booleans())
@moderate
def test_multiply(at: Around, size: int, d: int, squared: bool) -> None:
    z, y = at.range(size), at.range(size)
    x = y if squared else at.range(size)
    stream, layer = at.stream(), Multiply(size=size, width=d)
    found = apply(layer, stream, position_code(1, d, F64), x, y, z, writes=cells(stream, z))
    assert_same(
        read(found, z), multiply(read(stream, x), read(stream, y)), (stream,), kind="product"
    )


@given(arounds(), widths, st.sampled_from([0.0, 1.0, -0.3, 30.0]))
@moderate
def test_scale(at: Around, size: int, factor: float) -> None:
    x, y = at.range(size), at.range(size)
    stream = at.stream()
    found = apply(Scale(width=3, factor=factor), stream, CODE, x, y, writes=cells(stream, y))
    assert_same(read(found, y), scale(read(stream, x), factor), (stream,))


def test_float32() -> None:
    at = Around(0, 2, 9, None)
    x, y, z = (at.range(20) for _ in range(3))
    stream = at.stream()
    found = in_float32(Multiply(size=20, width=3), stream, CODE, x, y, z)
    assert error(read(found, z), read(stream, x) * read(stream, y)) < PRIMITIVE[torch.float32]
    found = in_float32(Scale(width=3, factor=0.1), stream, CODE, x, z)
    assert error(read(found, z), read(stream, x) * 0.1) < PRIMITIVE[torch.float32]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype) -> None:
    at = Around(0, 2, 9, None)
    x, y, z = (at.range(20) for _ in range(3))
    stream = at.stream().detach().to(dtype)
    found = Multiply(size=20, width=3).to(dtype)(stream.clone(), CODE.to(dtype), x, y, z)
    assert found.dtype == dtype
    assert error(read(found, z), read(stream, x).double() * read(stream, y).double()) < HALF[dtype]
