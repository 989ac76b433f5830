"""Masks and positions against TINT.md section 1, written out position by position."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.models import scattered_mask, tokens
from tests.support.scenarios import SCENARIOS
from tintc.runtime.batch import Batch
from tintc.runtime.masks import complete, next_token, segment_length

B, T = 3, 9


def a_batch(scenario: str) -> Batch:
    return Batch(**SCENARIOS[scenario](B, T, 29))


def may_look(batch: Batch, b: int, i: int, j: int) -> bool:
    mask = batch.attention_mask
    if j > i:
        return False
    if mask is None:
        return True
    return bool(mask[b, j] if mask.ndim == 2 else mask[b, i, j])


def is_token(batch: Batch, b: int, t: int) -> bool:
    """Whether it is no padding."""
    mask = batch.attention_mask
    if mask is None or mask.ndim == 2:
        return mask is None or bool(mask[b, t])
    return any(may_look(batch, b, i, t) for i in range(T))


def expected_carries(batch: Batch, b: int, t: int) -> bool:
    if t + 1 == T or not (is_token(batch, b, t) and is_token(batch, b, t + 1)):
        return False
    masks = [m for m in (batch.train_mask, batch.loss_mask) if m is not None]
    return all(bool(m[b, t + 1]) for m in masks)


def table(rule: Callable[..., object], *sizes: int) -> Tensor:
    places = itertools.product(*map(range, sizes))
    return torch.tensor([rule(*place) for place in places]).view(*sizes)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_position_by_position(scenario: str) -> None:
    batch = a_batch(scenario)
    found = complete(batch, torch.arange(T), torch.float64)
    allowed = found.tensors["attention_mask"].expand(B, 1, T, T)[:, 0]
    sees = table(lambda b, i, j: may_look(batch, b, i, j), B, T, T)
    lonely = ~sees.any(-1)
    assert torch.equal(allowed, sees | (torch.eye(T, dtype=torch.bool) & lonely[..., None]))
    carries = table(lambda b, t: expected_carries(batch, b, t), B, T)
    assert torch.equal(found.carries_BT, carries)
    assert torch.equal(found.tensors["loss_mask"], carries.double())
    targets = found.tensors["targets"]
    assert torch.equal(targets[carries], batch.input_ids.roll(-1, 1)[carries])
    last = max((t for b in range(B) for t in range(T) if carries[b, t]), default=0)
    assert int(segment_length(found.carries_BT, torch.arange(T))) == last + 1
    if batch.position_ids is None:
        counts = table(lambda b, t: sum(is_token(batch, b, s) for s in range(t + 1)) - 1, B, T)
        assert torch.equal(found.tensors["position_ids"], counts.clamp(min=0))
    else:
        assert torch.equal(found.tensors["position_ids"], batch.position_ids)


def test_nothing_to_train_leaves_a_segment_of_one() -> None:
    assert int(segment_length(torch.zeros(2, 4, dtype=torch.bool), torch.arange(4))) == 1


def test_next_token() -> None:
    ids = tokens(2, 4, 29)
    assert next_token(ids, -100).tolist() == [[*row[1:], -100] for row in ids.tolist()]
    mask = scattered_mask(2, 4).bool()
    assert next_token(mask).tolist() == [[*row[1:], False] for row in mask.tolist()]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    plain = a_batch("loss_mask")
    assert plain.train_mask is not None
    assert plain.loss_mask is not None
    other = Batch(plain.input_ids, plain.train_mask.to(dtype), plain.loss_mask.to(dtype))
    columns = torch.arange(T)
    found, wanted = (complete(x, columns, torch.float64).carries_BT for x in (other, plain))
    assert torch.equal(found, wanted)
