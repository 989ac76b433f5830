"""Spellings that people's own decoders have: recognised or an island, each equals autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tintc
from tests.compiler.test_islands import D, Decoder, V, attention, compare, feed, merged, split
from tests.support.grid import some
from tests.support.models import randomized
from tintc.ir.errors import UnsupportedModelError


class Spelled(Decoder):
    """How tokens are embedded and positions added is `embed(self, ids)`."""

    def __init__(self, embed: Callable[[Any, Tensor], Tensor], attend: Any = attention) -> None:
        super().__init__(attend, feed)
        self.spelled = embed
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.spelled(self, ids)
        for block in self.blocks:
            x = block(x, ids)
        return self.head(self.last(x))


def made(embed: Callable[[Any, Tensor], Tensor], attend: Any = attention) -> nn.Module:
    torch.manual_seed(2)
    return randomized(Spelled(embed, attend)).double().eval()


def counted(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)


def table(ids: Tensor) -> Tensor:
    """Sines of positions."""
    angles = counted(ids)[:, None] * 10.0 ** -torch.linspace(0, 1, D // 2)
    return torch.cat((angles.sin(), angles.cos()), -1)


EMBED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "W[ids]": lambda m, ids: m.token.weight[ids],
    "W[ids, :]": lambda m, ids: m.token.weight[ids, :],
    "one-hot": lambda m, ids: F.one_hot(ids, V).to(m.token.weight.dtype) @ m.token.weight,
    "index_select": lambda m, ids: m.token.weight.index_select(0, ids.flatten()).view(
        *ids.shape, D
    ),
    "positions with an axis more": lambda m, ids: m.token(ids) + m.position(counted(ids))[None],
    "positions repeated": lambda m, ids: (
        m.token(ids) + m.position(counted(ids)).unsqueeze(0).repeat(ids.shape[0], 1, 1)
    ),
    "positions viewed": lambda m, ids: (
        m.token(ids) + m.position(counted(ids)).view(1, ids.shape[1], D)
    ),
    "scaled sines": lambda m, ids: m.token(ids) + table(ids) * m.alpha,
    "normed positions": lambda m, ids: m.token(ids) + m.last(m.position(counted(ids))),
}


@some("name", EMBED, default=["W[ids, :]", "one-hot", "positions repeated", "scaled sines"])
def test_embeddings(name: str) -> None:
    compare(made(EMBED[name]), steps=2, batch=2, padded="left")


def plain(m: Any, ids: Tensor) -> Tensor:
    return m.token(ids) + m.position(counted(ids))


def autocast_off(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        q, k, v = split(m, x)
    return m.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def written_through_a_view(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    y = m.up(x)
    y.narrow(-1, 0, 6).mul_(0.5)
    return m.down(y.tanh())


def guarded(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = split(m, x)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    p = (q @ k.mT / 3).masked_fill(later, -torch.inf).softmax(-1)
    return m.out(merged(torch.where(p.isnan(), torch.zeros_like(p), p) @ v))


ATTEND: dict[str, Any] = {
    "autocast off": autocast_off,
    "written through a view": written_through_a_view,
    "a guard against NaN": guarded,
}


@some("name", ATTEND, default=["written through a view"])
def test_parts_of_blocks(name: str) -> None:
    compare(made(plain, ATTEND[name]), steps=2, batch=2, padded="right")


class Remembering(Decoder):
    """Keeps its table of positions from call to call."""

    def __init__(self) -> None:
        super().__init__(attention, feed)
        self.kept: tuple[int, Tensor] | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.kept is None or self.kept[0] != ids.shape[1]:
            self.kept = (ids.shape[1], table(ids))
        x = self.token(ids) + self.kept[1]
        for block in self.blocks:
            x = block(x, ids)
        return self.head(self.last(x))


def test_what_a_module_keeps_from_call_to_call_is_left_as_it_was() -> None:
    torch.manual_seed(2)
    model = randomized(Remembering()).double().eval()
    for length in (8, 22):  # that of the tracer's own sequence, and another
        model(torch.zeros(1, length, dtype=torch.long))
        before = model.kept
        simulator = tintc.compile(model, tintc.SimulatorConfig.exact())
        assert model.kept is before
        ids = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.allclose(simulator.predict_initial(ids), model(ids), atol=1e-9)


def test_a_head_cut_to_the_vocabulary_takes_its_tokens_alone() -> None:
    torch.manual_seed(2)
    model = randomized(Decoder(attention, feed)).double().eval()
    cut = nn.Sequential(model, _First(V - 3))
    simulator = tintc.compile(cut, tintc.SimulatorConfig.exact())
    assert simulator.program.facts.vocab_size == V - 3


class _First(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, logits: Tensor) -> Tensor:
        return logits[..., : self.count]


def through_pieces(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    y = m.up(x)
    y.unfold(-1, 4, 4).mul_(0.5)
    return m.down(y.tanh())


def through_unsafe_pieces(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    y = m.up(x)
    y.unsafe_chunk(2, -1)[0].mul_(0.5)
    return m.down(y.tanh())


def test_a_write_through_an_unfolded_view() -> None:
    """torch's functionalization fixes its sizes to those of the traced call."""
    compare(made(plain, through_pieces), steps=1, batch=2, padded="right")


def test_a_write_that_autograd_does_not_see_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"aten.mul_.Tensor in blocks\.0 \(test_\w+\.py:\d+\) writes in place through "
        r"aten\.unsafe_chunk\.default",
    ):
        tintc.compile(made(plain, through_unsafe_pieces), tintc.SimulatorConfig.exact())
