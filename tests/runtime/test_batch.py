"""Batch: rows and first tokens of all that travels together."""

import pytest
import torch

from tests.support.models import tokens
from tests.support.scenarios import SCENARIOS
from tintc.ir.errors import InputError
from tintc.runtime.batch import Batch

FIELDS = ("input_ids", "train_mask", "loss_mask", "attention_mask", "position_ids")


def full(batch: int = 3, length: int = 7) -> Batch:
    """Every field different from row to row and from token to token."""
    parts = [tokens(batch, length, 29, seed=seed) for seed in range(5)]
    parts[3] = tokens(batch, length * length, 2).view(batch, length, length)
    return Batch(*parts)


def same(found: Batch, **expected: torch.Tensor) -> bool:
    return all(torch.equal(getattr(found, name), value) for name, value in expected.items())


@pytest.mark.parametrize("index", [0, 2, -1, -3])
def test_row(index: int) -> None:
    whole = full()
    expected = {name: getattr(whole, name)[index][None] for name in FIELDS}
    assert same(whole.row(index), **expected)


def test_rows() -> None:
    whole = full()
    assert len(whole.rows(1, 3)) == 2
    assert same(whole.rows(1, 3), **{name: getattr(whole, name)[1:3] for name in FIELDS})
    assert Batch(whole.input_ids).rows(0, 1).attention_mask is None


@pytest.mark.parametrize("index", [3, -4, "1", 1.0])
def test_no_such_row(index: int) -> None:
    with pytest.raises(InputError, match=r"index is .*; the batch has 3 sequences"):
        full().row(index)


@pytest.mark.parametrize("name", FIELDS[1:])
def test_a_field_with_other_sequences_is_no_batch(name: str) -> None:
    whole = full()
    given = {field: getattr(whole, field) for field in FIELDS}
    given[name] = given[name][:2]
    with pytest.raises(InputError, match=rf"{name} has shape \(2, .*; expected 3 sequences"):
        Batch(**given).row(0)


def test_first_tokens() -> None:
    whole = full()
    found = whole.first_tokens(4)
    flat = {name: getattr(whole, name)[:, :4] for name in FIELDS if name != "attention_mask"}
    assert same(found, **flat, attention_mask=whole.attention_mask[:, :4, :4])
    padded = Batch(whole.input_ids, attention_mask=whole.train_mask).first_tokens(4)
    assert same(padded, attention_mask=whole.train_mask[:, :4])
    assert padded.train_mask is None


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_names_are_those_of_the_calls(scenario: str) -> None:
    inputs = SCENARIOS[scenario](2, 9, 29)
    batch = Batch(**inputs)
    given = {name: value for name, value in batch.trained().items() if value is not None}
    assert given == inputs
    assert set(batch.trained()) == set(FIELDS)
    assert set(batch.trained()) - set(batch.prompt()) == {"train_mask", "loss_mask"}


def test_targets() -> None:
    train, loss = torch.tensor([[1.0, 1, 0]]), torch.tensor([[0, 1, 1]])
    ids = torch.zeros(1, 3).long()
    assert Batch(ids, train).targets().tolist() == [[True, True, False]]
    assert Batch(ids, train, loss).targets().tolist() == [[False, True, False]]
