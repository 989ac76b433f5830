"""What can be no island is refused in words: the first operator, where it stands, what was seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tintc
from tests.compiler.test_islands import Change, D, Decoder, attention, feed
from tests.support.models import randomized
from tintc.ir.errors import UnsupportedModelError


def as_many_as_positive(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """How many rows are read depends on the numbers."""
    rows = x.flatten(0, 1)
    places = torch.nonzero(rows[:, 0] > 0)[:, 0]
    return torch.zeros_like(rows).index_add(0, places, rows[places]).view_as(x)


def whole_mean(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x * x.shape[1]


def counting(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    m.norm.calls.add_(1)
    return feed(m, x * m.norm.calls, ids)


def branching(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return feed(m, x if bool(x.sum() > 0) else -x, ids)


def fixed(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return feed(m, x + torch.zeros(len(x[0]), D), ids)


def later(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return m.down(torch.tanh(m.up(x + torch.flip(x, [1]))))


def mixed(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return m.down(torch.tanh(m.up(x - x.mean(0, keepdim=True))))


def drawn(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return m.down(torch.rand_like(m.up(x)))


def stopped(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return m.down(torch.sin(m.up(x).detach()))


def decoder(attend: Change, change: Change) -> nn.Module:
    torch.manual_seed(1)
    model = randomized(Decoder(attend, change)).double().eval()
    for block in model.blocks:
        block.norm.register_buffer("calls", torch.ones(()))
    return model


REFUSED: dict[str, tuple[Change, str]] = {
    "later tokens": (
        later,
        r"aten\.flip\.default x2 in blocks\.0 \(test_islands\.py:\d+\): "
        "changing token 4 changed output 2",
    ),
    "other sequences": (mixed, "mixes the sequences of a batch"),
    "random numbers": (drawn, r"aten\.rand_like\.default x2 .*draws random numbers"),
    "a stopped gradient": (stopped, r"aten\.detach\.default x2 .*stops the gradient"),
    "data-dependent sizes": (
        as_many_as_positive,
        r"aten\.nonzero\.default x2 in blocks\.0 \(test_islands\.py:\d+\): how much it gives "
        "depends on the numbers that it reads",
    ),
    "the length": (whole_mean, "it depends on the length of the sequence: with 2 tokens"),
    "a buffer written": (
        counting,
        r"its forward pass writes to (auxiliary\.)?blocks\.0\.norm\.calls in place; expected a "
        "model that changes nothing of its own",
    ),
    "a branch": (branching, "without control flow that depends on the data"),
    "a size as a number": (fixed, r"makes a plain number of .* as len\(x\) does"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    change, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        tintc.compile(decoder(attention, change), tintc.SimulatorConfig.exact())
    assert "\n" not in str(caught.value)


def test_the_first_in_the_program_comes_first() -> None:
    """Of two that no island may hold, the one that runs first, whatever regions come first."""

    def stops(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        return attention(m, torch.sin(x.detach()), ids)

    def draws(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        return feed(m, x * torch.rand_like(x), ids)

    for attend, change, order in (
        (stops, feed, ["detach"]),
        (stops, draws, ["detach", "rand_like"]),
        (lambda m, x, ids: attention(m, x * torch.rand_like(x), ids),
         lambda m, x, ids: feed(m, torch.sin(x.detach()), ids), ["rand_like", "detach"]),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModelError) as caught:
            tintc.compile(decoder(attend, change), tintc.SimulatorConfig.exact())
        said = str(caught.value)
        places = [said.find(f"aten.{name}.default x2 in blocks.0 (") for name in order]
        assert min(places) >= 0 and places == sorted(places), said


CODE = """
class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.head = torch.nn.Embedding(19, 8), torch.nn.Linear(8, 19)

    def forward(self, ids):
        x = self.token(ids)
        x = x.flip(1)
        return self.head(x)
"""


@pytest.mark.parametrize("name", ["<string>", "notebook.py"])
def test_code_from_exec_is_named_by_its_line(name: str) -> None:
    space: dict[str, Any] = {"torch": torch}
    exec(compile(CODE, name, "exec"), space)
    with pytest.raises(UnsupportedModelError, match=rf"flip\.default x1 in the model \({name}:9\)"):
        tintc.compile(space["Decoder"]().double().eval(), tintc.SimulatorConfig.exact())
