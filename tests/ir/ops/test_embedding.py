"""tintc.ir.ops.embedding: rows of a table, and the training segment's slices."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.support.shapes import Draw, batches, lengths, seeds, shared, widths
from tests.support.tolerances import PRIMITIVE, error
from tintc.ir.ops.embedding import (
    embedding,
    embedding_descent,
    segment,
    segment_mask,
    without_padding,
)


@given(batches, lengths, widths, st.integers(1, 9), st.integers(0, 3), seeds)
def test_embedding_reads_rows(b: int, t: int, d: int, rows: int, offset: int, seed: int) -> None:
    draw = Draw(seed)
    table = draw(rows + offset, d)
    index = torch.randint(rows, (b, t), generator=draw.generator)
    found = embedding(table, index, offset)
    assert found.shape == (b, t, d)
    for n in range(b):
        for i in range(t):
            assert torch.equal(found[n, i], table[int(index[n, i]) + offset])
    assert torch.equal(embedding(table[None], index, offset), found), (
        "a table of one sequence, as models hold those of positions"
    )


@given(batches, lengths, widths, st.integers(1, 9), st.integers(0, 3), shared, seeds)
def test_descent_is_autograds(
    b: int, t: int, d: int, rows: int, offset: int, own: bool, seed: int
) -> None:
    """Rows that several tokens read get the sum, rows that none reads stay equal to the bit."""
    draw = Draw(seed)
    table = draw.parameter(b, not own, rows + offset, d)
    index = torch.randint(rows, (b, t), generator=draw.generator)
    dy, rate = draw(b, t, d).detach(), torch.tensor(0.3, dtype=torch.float64)
    each = table.expand(b, rows + offset, d).detach().clone().requires_grad_()
    (embedding(each, index, offset) * dy).sum().backward()  # type: ignore[no-untyped-call]
    assert each.grad is not None
    expected = each.detach() - rate * each.grad
    found = embedding_descent(table, dy, index, offset, rate)
    assert error(found, expected) < PRIMITIVE[torch.float64]
    unread = each.grad == 0
    assert torch.equal(found[unread], each[unread])
    rates = torch.linspace(0.1, 1, b, dtype=torch.float64)
    expected = each.detach() - rates[:, None, None] * each.grad
    found = embedding_descent(table, dy, index, offset, rates)
    assert error(found, expected) < PRIMITIVE[torch.float64]


@given(batches, lengths, widths, st.integers(2, 9), seeds)
def test_the_row_of_padding_gets_no_gradient(b: int, t: int, d: int, rows: int, seed: int) -> None:
    draw = Draw(seed)
    table, dy = draw(rows, d), draw(b, t, d).detach()
    index = torch.randint(rows, (b, t), generator=draw.generator)
    (F.embedding(index, table, padding_idx=1) * dy).sum().backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None
    one = torch.tensor(1.0, dtype=torch.float64)
    found = embedding_descent(table, without_padding(dy, index, 1), index, 0, one).detach()
    change = (table.detach() - found).sum(0)
    assert error(change, table.grad) < PRIMITIVE[torch.float64]


@given(batches, st.integers(1, 7), widths, st.data())
def test_segment_keeps_the_first_tokens(b: int, t: int, d: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, t))
    x = torch.arange(b * t * d).reshape(b, t, d)
    mask = torch.arange(b * t * t).reshape(b, 1, t, t)
    assert torch.equal(segment(x, length), torch.stack([row[:length] for row in x]))
    assert torch.equal(segment(x[..., 0], length), torch.stack([row[:length] for row in x[..., 0]]))
    cut = segment_mask(mask, length)
    assert cut.shape == (b, 1, length, length)
    assert all(
        int(cut[n, 0, i, j]) == int(mask[n, 0, i, j])
        for n in range(b)
        for i in range(length)
        for j in range(length)
    )
