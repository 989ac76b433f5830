"""Which tokens of which document each step of a stream reads."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.test_stream_steps import stream_of, text
from tests.runtime.test_streaming import CHUNK
from tintc.ir.errors import InputError
from tintc.runtime.reading import Rows

LENGTHS = (9, 2, 14, 5, 4)


def rows_of(batch: int) -> Rows:
    return Rows(stream_of(batch), [text(n, n)[0] for n in LENGTHS])


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_every_target_is_read_once_and_in_order(batch: int) -> None:
    rows = rows_of(batch)
    read: dict[int, list[int]] = {}
    ended = []
    while not rows.is_done:
        for piece in rows.step():
            assert 0 < len(piece.losses) <= CHUNK
            assert piece.unmodified is None
            positions = range(piece.start, piece.start + len(piece.losses))
            read.setdefault(piece.document, []).extend(positions)
            ended += [piece.document] * piece.is_last
    assert read == {number: list(range(1, n)) for number, n in enumerate(LENGTHS)}
    assert sorted(ended) == list(range(len(LENGTHS)))


def test_steps_that_are_skipped_are_those_that_were_read() -> None:
    first, later = rows_of(2), rows_of(2)
    for _ in range(3):
        first.step()
    later.stream.load_state_dict(first.stream.state_dict())
    later.skip(3)
    while not first.is_done:
        assert later.reading == first.reading
        for a, b in zip(first.step(), later.step(), strict=True):
            assert (a.document, a.start, a.is_last) == (b.document, b.start, b.is_last)
            assert torch.equal(a.losses, b.losses)
    assert later.is_done


def test_more_steps_than_there_are() -> None:
    with pytest.raises(InputError, match=r"are read after \d+ steps, before 99"):
        rows_of(1).skip(99)
