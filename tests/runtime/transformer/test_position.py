"""tintc.runtime.backends.transformer.modules.position against tintc.ir.ops.position and
torch.autograd.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.around import F64, Around, apply, arounds, assert_same, cells, in_float32
from tests.support.shapes import Draw
from tests.support.tolerances import HALF, PRIMITIVE, error
from tintc.ir.ops.position import PAIRINGS, partner, rotary
from tintc.runtime.backends.transformer.modules.parts import position_code, read
from tintc.runtime.backends.transformer.modules.position import Partner, Rotary

moderate = settings(max_examples=50)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("turned", [2, 4, 10])
def test_partner_is_a_permutation(pairing: str, turned: int) -> None:
    """Every coordinate goes to its partner and back, bit for bit, by 2 R numbers."""
    layer, x = Partner(turned, pairing), Draw(0)(3, 5, turned).detach()
    assert torch.equal(layer(x), partner(x, turned, pairing))
    assert torch.equal(layer(layer(x)), x)
    assert sum(p.numel() for p in layer.parameters()) == 2 * turned


@given(
    arounds(),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 5),
    st.sampled_from(PAIRINGS),
    st.booleans(),
)
@moderate
def test_rotary(
    at: Around, heads: int, half: int, rest: int, d: int, pairing: str, transpose: bool
) -> None:
    """Of tables that are no rotation, too: what is scaled keeps its scale, and the transposed map
    is the gradient.
    """
    turned, size = 2 * half, heads * (2 * half + rest)
    y, x, sin, cos = (at.range(n) for n in (size, size, turned, turned))
    stream, code = at.stream(), position_code(1, d, F64)
    layer = Rotary(heads=heads, turned=turned, width=d, pairing=pairing, transpose=transpose)
    found = apply(layer, stream, code, x, cos, sin, y, writes=cells(stream, y))
    tables = read(stream, cos), read(stream, sin)
    expected = rotary(read(stream, x), *tables, heads, pairing, transpose)
    assert_same(read(found, y), expected, (stream,), kind="rotary")
    value = read(stream, x).detach().requires_grad_()
    forward = rotary(value, *tables, heads, pairing, not transpose)
    (by_autograd,) = torch.autograd.grad(forward, value, read(stream, x))
    assert error(read(found, y), by_autograd) < 1e-9


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_lower_precision(dtype: torch.dtype, pairing: str, transpose: bool) -> None:
    at = Around(0, 2, 9, None)
    y, x, cos, sin = (at.range(n) for n in (30, 30, 8, 8))
    stream, code = at.stream().detach().to(dtype).double(), position_code(2, 5, F64)
    layer = Rotary(heads=3, turned=8, width=5, pairing=pairing, transpose=transpose)
    expected = rotary(read(stream, x), read(stream, cos), read(stream, sin), 3, pairing, transpose)
    if dtype == torch.float32:
        found, limit = in_float32(layer, stream, code, x, cos, sin, y), PRIMITIVE[dtype]
    else:
        found, limit = (
            layer.to(dtype)(stream.to(dtype), code.to(dtype), x, cos, sin, y),
            HALF[dtype],
        )
    assert found.dtype == dtype
    assert error(read(found, y), expected) < limit
