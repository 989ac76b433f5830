"""Weights of one memory are one weight, and views of a part of it are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tintc
from tests.support.nano import Nano, nano
from tests.support.tolerances import SIMULATOR, error
from tintc.compiler.frontend.state import state_of
from tintc.ir.errors import UnsupportedModelError

FIRST, SECOND = "blocks.0.up.weight", "blocks.1.up.weight"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def by_data(model: Nano) -> None:
    model.blocks[1].up.weight.data = model.blocks[0].up.weight.data


def by_parameter(model: Nano) -> None:
    model.blocks[1].up.weight = nn.Parameter(model.blocks[0].up.weight)


@pytest.mark.parametrize("tie", [by_data, by_parameter])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_memory_is_one_weight(tie: Callable[[Nano], None], device: str) -> None:
    model = nano().to(device)
    tie(model)
    assert model.blocks[0].up.weight is not model.blocks[1].up.weight
    tensors, aliases = state_of(model)
    assert aliases == {SECOND: FIRST}
    assert SECOND not in tensors


@pytest.mark.parametrize("tie", [by_data, by_parameter])
def test_a_step_adds_both_gradients_as_sgd_does(tie: Callable[[Nano], None]) -> None:
    model, trained = nano(), nano()
    tie(model)
    tie(trained)
    simulator = tintc.compile(model, tintc.SimulatorConfig.exact(inner_lr=0.1))
    found = simulator.updated_state_dict(IDS, torch.ones_like(IDS))
    logits = trained(IDS)
    nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:], reduction="sum").backward()
    torch.optim.SGD(trained.blocks.parameters(), lr=0.1, foreach=False).step()
    for name in (FIRST, SECOND):
        expected = trained.get_parameter(name)
        assert error(found[name], expected) < SIMULATOR[torch.float64]
        assert error(model.get_parameter(name), expected) > 1e-3


@pytest.mark.parametrize(
    "view",
    [lambda w: w[1:], lambda w: w.t(), lambda w: w.view(-1)],
    ids=["rows", "transposed", "flat"],
)
def test_views_of_a_part_are_refused(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = nano()
    model.further = nn.Parameter(view(model.blocks[0].up.weight.data))
    with pytest.raises(
        UnsupportedModelError, match=r"further.* views of the same memory"
    ) as caught:
        tintc.compile(model)
    assert FIRST in str(caught.value)


def test_buffers_may_share_and_parts_of_one_memory_may_lie_side_by_side() -> None:
    model = nano()
    numbers = list(model.parameters())
    flat = torch.cat([p.data.flatten() for p in numbers])
    for p, part in zip(numbers, flat.split([p.numel() for p in numbers]), strict=True):
        p.data = part.view(p.shape)
    model.register_buffer("positions_twice", torch.arange(12.0))
    model.register_buffer("some_of_them", model.positions_twice[:4])
    tensors, aliases = state_of(model)
    assert aliases == {}
    assert set(tensors) == set(model.state_dict())
