"""tintc.ir.ops.elementwise against torch.autograd: each is, or is part of, its own backward
pass.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.shapes import Draw, batches, lengths, seeds, widths
from tests.support.tolerances import PRIMITIVE, error
from tintc.ir.ops.elementwise import multiply, residual, scale

LIMIT = PRIMITIVE[torch.float64]


@given(batches, lengths, widths, seeds)
def test_residual_adds(b: int, t: int, d: int, seed: int) -> None:
    draw = Draw(seed)
    x, y = draw(b, t, d), draw(b, t, d)
    assert torch.equal(residual(x, y), x + y)


@given(batches, lengths, widths, seeds)
def test_multiply(b: int, t: int, d: int, seed: int) -> None:
    draw = Draw(seed)
    x, y, dz = draw(b, t, d), draw(b, t, d), draw(b, t, d)
    z = multiply(x, y)
    assert torch.equal(z, x * y)
    dx, dy = torch.autograd.grad(x * y, (x, y), dz)
    assert error(multiply(dz, y), dx) < LIMIT
    assert error(multiply(dz, x), dy) < LIMIT


@given(batches, lengths, widths, st.sampled_from([0.0, 0.7, 1.0, -3.0]), seeds)
def test_scale(b: int, t: int, d: int, factor: float, seed: int) -> None:
    draw = Draw(seed)
    x, dy = draw(b, t, d), draw(b, t, d)
    assert torch.equal(scale(x, factor), x * factor)
    (dx,) = torch.autograd.grad(x * factor, x, dy)
    assert error(scale(dy, factor), dx) < LIMIT
