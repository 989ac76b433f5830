"""tintc.runtime.backends.transformer.modules.embedding against tintc.ir.ops: embeddings, the head
and the loss.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.around import F64, Around, apply, arounds, assert_same, cells
from tests.support.shapes import widths
from tests.support.tolerances import HALF, error
from tintc.ir.ops.embedding import embedding
from tintc.ir.ops.linear import linear_backward, linear_forward
from tintc.ir.ops.loss import loss_gradient, mean_embedding_gradient
from tintc.runtime.backends.transformer.modules.embedding import (
    Embedding,
    HeadBackward,
    HeadForward,
    LossGradient,
    MeanEmbeddingGradient,
)
from tintc.runtime.backends.transformer.modules.parts import Range, position_code, read

moderate = settings(max_examples=50)
vocabularies = st.integers(1, 11)
CODE = position_code(2, 3, F64)


def indices(at: Around, most: int) -> Tensor:
    return torch.randint(most, (at.batch, at.used), generator=at.draw.generator)


def loss_mask(at: Around) -> Tensor:
    return (torch.rand(at.batch, at.used, generator=at.draw.generator) < 0.6).double()


@given(arounds(), vocabularies, widths, st.integers(0, 3), st.booleans())
@moderate
def test_embedding(at: Around, rows: int, size: int, offset: int, of_one_sequence: bool) -> None:
    y = at.range(size)
    table = at.draw(1, rows + offset, size) if of_one_sequence else at.draw(rows + offset, size)
    stream, index = at.stream(), indices(at, rows)
    found = apply(
        Embedding(width=3, offset=offset), stream, CODE, table, index, y, writes=cells(stream, y)
    )
    assert_same(read(found, y), embedding(table, index, offset), (stream, table))


@given(arounds(), vocabularies, widths, st.booleans())
@moderate
def test_head(at: Around, vocab: int, size: int, has_bias: bool) -> None:
    dh, h, dz, z = at.range(size), at.range(size), at.range(vocab), at.range(vocab)
    stream, table, bias = at.stream(), at.draw(vocab, size), at.draw(vocab) if has_bias else None
    found = apply(HeadForward(width=3), stream, CODE, table, bias, h, z, writes=cells(stream, z))
    inputs = (stream, table) if bias is None else (stream, table, bias)
    assert_same(read(found, z), linear_forward(read(stream, h), table, bias), inputs)
    found = apply(HeadBackward(width=3), stream, CODE, table, dz, dh, writes=cells(stream, dh))
    assert_same(read(found, dh), linear_backward(read(stream, dz), table), (stream, table))


@given(arounds(), vocabularies, st.sampled_from(["softmax", "quadratic"]))
@moderate
def test_loss_gradient(at: Around, vocab: int, kind: str) -> None:
    z, dz = at.range(vocab), at.range(vocab)
    stream, targets, mask = at.stream(3.0), indices(at, vocab), loss_mask(at)
    found = apply(
        LossGradient(width=3, kind=kind),
        stream,
        CODE,
        targets,
        mask,
        z,
        dz,
        writes=cells(stream, dz),
    )
    assert_same(read(found, dz), loss_gradient(read(stream, z), targets, mask, kind), (stream,))
    assert bool((read(found, dz)[mask == 0] == 0).all())


@given(arounds(), vocabularies, widths)
@moderate
def test_mean_embedding_gradient(at: Around, vocab: int, size: int) -> None:
    dh = at.range(size)
    stream, table, targets, mask = (
        at.stream(),
        at.draw(vocab, size),
        indices(at, vocab),
        loss_mask(at),
    )
    found = apply(
        MeanEmbeddingGradient(width=3),
        stream,
        CODE,
        table,
        targets,
        mask,
        dh,
        writes=cells(stream, dh),
    )
    assert_same(read(found, dh), mean_embedding_gradient(table, targets, mask), (stream, table))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["softmax", "quadratic"])
def test_half_precision_loss(kind: str, dtype: torch.dtype) -> None:
    at = Around(0, 2, 9, None)
    z, dz = at.range(33), at.range(33)
    stream, targets, mask = at.stream(3.0).detach().to(dtype), indices(at, 33), loss_mask(at)
    found = LossGradient(width=3, kind=kind).to(dtype)(
        stream.clone(), CODE.to(dtype), targets, mask.to(dtype), z, dz
    )
    assert found.dtype == dtype
    assert (
        error(read(found, dz), loss_gradient(read(stream, z).double(), targets, mask, kind))
        < HALF[dtype]
    )


def test_large_logits_stay_finite() -> None:
    stream = torch.tensor([[[3000.0, -3000.0, 0.0, 0.0, 0.0, 0.0]]], dtype=F64)
    layer = LossGradient(width=3, kind="softmax")
    found = layer(
        stream,
        CODE,
        torch.tensor([[1]]),
        torch.ones(1, 1, dtype=F64),
        Range(0, 3, None),
        Range(3, 6, None),
    )
    assert found[0, 0, 3:].tolist() == [1.0, -1.0, 0.0]
