"""tintc.ir.ops.onednn against the operators that it stands for, in float32: it has no kernels for
float64.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, batches, lengths, seeds, shared, widths
from tests.support.tolerances import PRIMITIVE, error
from tintc.ir.ops.linear import linear_backward, linear_descent, linear_forward
from tintc.ir.ops.low_rank import low_rank
from tintc.ir.ops.onednn import available, onednn_descent, onednn_low_rank, onednn_product

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")

LIMIT = PRIMITIVE[torch.float32]
ETA = torch.tensor(0.37, dtype=torch.float64)
biases = st.sampled_from(["none", "shared", "own"])


def low(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().float() for x in tensors]


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """What `low` rounded, in float64 again."""
    return [None if x is None else x.double() for x in low(*tensors)]


@given(batches, lengths, widths, widths, shared, biases, st.booleans(), st.booleans(), seeds)
def test_product(
    b: int,
    t: int,
    i: int,
    o: int,
    one_weight: bool,
    bias_kind: str,
    more: bool,
    stored: bool,
    seed: int,
) -> None:
    """Every kind of weight, bias and addend; stored: the weight is a transposed view, as GPT-2
    stores it.
    """
    draw = Draw(seed)
    x, weight = draw(b, t, i), draw.parameter(b, one_weight, *((i, o) if stored else (o, i)))
    weight = weight.mT if stored else weight
    bias = None if bias_kind == "none" else draw.parameter(b, bias_kind == "shared", o)
    addend = draw(b, t, o) if more else None
    inputs = low(x, weight, bias, addend)
    before = [None if value is None else value.clone() for value in inputs]
    found = onednn_product(*inputs, False)  # type: ignore[arg-type]
    x_, weight_, bias_, addend_ = wide(x, weight, bias, addend)
    expected = linear_forward(x_, weight_, bias_)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    assert error(found, expected if addend_ is None else expected + addend_) < LIMIT
    assert all(
        a is None or torch.equal(a, c) for a, c in zip(inputs, before, strict=True)
    )  # nothing is written in place


@given(batches, lengths, widths, widths, shared, st.booleans(), seeds)
def test_product_with_the_transposed_weight(
    b: int, t: int, i: int, o: int, one_weight: bool, more: bool, seed: int
) -> None:
    draw = Draw(seed)
    dy, weight, addend = (
        draw(b, t, o),
        draw.parameter(b, one_weight, o, i),
        draw(b, t, i) if more else None,
    )
    found = onednn_product(*low(dy, weight, None, addend), True)  # type: ignore[arg-type]
    dy_, weight_, addend_ = wide(dy, weight, addend)
    expected = linear_backward(dy_, weight_)  # type: ignore[arg-type]
    assert error(found, expected if addend_ is None else expected + addend_) < LIMIT


def test_shapes_without_numbers() -> None:
    """What torch.compile asks: the kernel's shape and strides, of every kind of argument."""
    x, weight, bias, addend = (
        torch.ones(2, 5, 3),
        torch.ones(4, 3),
        torch.ones(4),
        torch.ones(2, 5, 4),
    )
    product = torch.ops.tint_kernels.product
    for args in (
        *((x, weight, None, None), (x, weight, bias, None), (x, weight, bias, addend)),
        *((x[0], weight, None, addend[0]), (x.mT.contiguous().mT, weight, None, None)),
        (x, torch.ones(3, 4).mT, None, None),
    ):
        torch.library.opcheck(product, args, test_utils=("test_schema", "test_faketensor"))


@given(batches, lengths, lengths, widths, widths, st.booleans(), seeds)
def test_low_rank(b: int, t: int, s: int, i: int, o: int, with_bias: bool, seed: int) -> None:
    draw = Draw(seed)
    tensors = draw(b, t, o), draw(b, t, i), draw(b, s, i), draw(b, s, o)
    inputs = low(*tensors)
    before = [value.clone() for value in inputs if value is not None]
    found = onednn_low_rank(*inputs, ETA, with_bias)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    assert error(found, low_rank(*wide(*tensors), ETA, with_bias)) < LIMIT  # type: ignore[arg-type]
    assert all(torch.equal(a, c) for a, c in zip(inputs, before, strict=True))  # type: ignore[arg-type]


@given(batches, lengths, widths, widths, shared, seeds)
def test_descent(b: int, t: int, i: int, o: int, one_weight: bool, seed: int) -> None:
    draw = Draw(seed)
    tensors = draw.parameter(b, one_weight, o, i), draw(b, t, o), draw(b, t, i)
    inputs = low(*tensors)
    before = [value.clone() for value in inputs if value is not None]
    found = onednn_descent(*inputs, ETA)  # type: ignore[arg-type]
    assert found.shape == (b, o, i)
    assert error(found, linear_descent(*wide(*tensors), ETA)) < LIMIT  # type: ignore[arg-type]
    assert all(torch.equal(a, c) for a, c in zip(inputs, before, strict=True))  # type: ignore[arg-type]
