"""Decoders whose blocks stand in a Sequential and whose outputs are more than logits, and
embeddings of token types: each is exact against autograd, or refused in one line with its place.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tintc
from tests.support.decoders import HIDDEN, POSITIONS, VOCAB, FeedForward, MaskedAttention
from tests.support.models import randomized
from tests.support.tolerances import SIMULATOR, error
from tintc.ir.errors import UnsupportedModelError

CONFIG = tintc.SimulatorConfig.exact(inner_lr=0.02)
IDS = torch.arange(2 * 11).reshape(2, 11) * 7 % VOCAB


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = (
            nn.LayerNorm(HIDDEN),
            MaskedAttention(),
            nn.LayerNorm(HIDDEN),
            FeedForward(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Carrying(Block):
    """(x, loss) -> the same: blocks of a Sequential hand a loss on."""

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, loss = state
        x = super().forward(x)
        return x, loss + x.square().mean()


class Exiting(Block):
    """(x, logits) -> the same: every block has a head of its own, and the last one's counts."""

    def __init__(self) -> None:
        super().__init__()
        self.exit = nn.Linear(HIDDEN, VOCAB)

    def forward(self, state: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = super().forward(state[0])
        return x, self.exit(x)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))


class Decoder(nn.Module):
    """embedding -> Sequential of blocks -> `finish(self, x, ids, targets)`."""

    def __init__(self, finish: Callable[..., Any], block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.embedded, self.blocks = Embedded(), nn.Sequential(block(), block())
        self.ln_f, self.lm_head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.finish = finish

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        return self.finish(self, self.embedded(ids), ids, targets)

    def logits(self, x: Tensor) -> Tensor:
        return self.lm_head(self.ln_f(x))


def with_loss(m: Any, x: Tensor, ids: Tensor, targets: Tensor | None) -> Any:
    logits = m.logits(m.blocks(x))
    loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return logits, loss


def own_loss(m: Any, x: Tensor, ids: Tensor, targets: Tensor | None) -> Any:
    logits = m.logits(m.blocks(x))
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def in_a_dict(m: Any, x: Tensor, ids: Tensor, targets: Tensor | None) -> Any:
    return {"loss": None, "logits": m.logits(m.blocks(x))}


def carried(m: Any, x: Tensor, ids: Tensor, targets: Tensor | None) -> Any:
    x, loss = m.blocks((x, x.new_zeros(())))
    return m.logits(x), loss


def exits(m: Any, x: Tensor, ids: Tensor, targets: Tensor | None) -> Any:
    return m.blocks((x, None))[1], None


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_f, self.lm_head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB)

    def forward(self, x: Tensor) -> Any:
        return self.lm_head(self.ln_f(x)), None


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "logits and loss": lambda: Decoder(with_loss),
    "a dict": lambda: Decoder(in_a_dict),
    "a loss through the blocks": lambda: Decoder(carried, Carrying),
    "heads in the blocks": lambda: Decoder(exits, Exiting),
    "a Sequential throughout": lambda: nn.Sequential(
        Embedded(), nn.Sequential(Block(), Block()), Head()
    ),
}


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out: Any = model(ids)
    logits: Tensor = out["logits"] if isinstance(out, dict) else out[0]
    return logits


def assert_a_step_is_that_of_autograd(model: nn.Module) -> None:
    """Every weight of the blocks and what is behind them, after one step on the second sequence."""
    simulator = tintc.compile(model, CONFIG, check="none")
    with torch.inference_mode():
        found = simulator.updated_state_dict(IDS, torch.ones_like(IDS), 1)
    logits = logits_of(model, IDS)
    loss = F.cross_entropy(logits[1, :-1], IDS[1, 1:], reduction="sum")
    slots = simulator.program.layout.prefix.values()
    trained = {slot.parameter for slot in slots if slot.trainable}
    assert len(trained) >= 2 * 12
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [named[name] for name in trained])
    for name, gradient in zip(trained, gradients, strict=True):
        expected = named[name] - CONFIG.inner_lr * gradient
        assert error(found[name], expected) < SIMULATOR[torch.float64], name
    with torch.inference_mode():
        assert error(simulator.predict_initial(IDS), logits) < SIMULATOR[torch.float64]


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_is_that_of_autograd(name: str) -> None:
    assert_a_step_is_that_of_autograd(randomized(DECODERS[name]().double()))


def refusal(model: nn.Module, **options: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        tintc.compile(model.double(), CONFIG, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Decoder(lambda *_: ()), "Decoder returned a tuple; expected logits of shape"),
        (lambda: Decoder(lambda *_: {"loss": 1}), "Decoder returned a dict; expected logits of"),
    ],
    ids=["nothing", "no logits"],
)
def test_refused(model: Callable[[], nn.Module], said: str) -> None:
    assert re.search(said, refusal(model()))


def zeros(ids: Tensor, dtype: str = "long") -> Tensor:
    """Types made by a helper that takes the dtype as text."""
    return torch.zeros(ids.shape, dtype=getattr(torch, dtype), device=ids.device)


TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "new_zeros": lambda ids: ids.new_zeros(ids.shape),
    "a helper": lambda ids: zeros(ids),
    "a helper and a cast": lambda ids: zeros(ids, "float32").to(getattr(torch, "int64")),  # noqa: B009
    "a type by name": lambda ids: zeros(ids, "float32").type("torch.LongTensor"),
    "the type of ids": lambda ids: zeros(ids, "float32").type(ids.type()),
    "one for all": lambda ids: ids.new_zeros(1, 1),
    "a number": lambda ids: torch.tensor(1),
    "ones": lambda ids: torch.ones_like(ids),
    "written in place": lambda ids: torch.empty_like(ids).fill_(1),
    "the ids times 0": lambda ids: ids * 0,
    "large ids": lambda ids: (ids > 5).long(),
    "every other": lambda ids: torch.arange(ids.shape[1]) % 2,
    "a second segment": lambda ids: (torch.arange(ids.shape[1]) > 3).long(),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.slow
def test_token_types_are_islands_or_refused_with_their_place(name: str) -> None:
    def finish(m: Any, x: Tensor, ids: Tensor, targets: Tensor | None) -> Any:
        return with_loss(m, x + m.types(TYPES[name](ids)), ids, targets)

    model = Decoder(finish)
    model.types = nn.Embedding(2, HIDDEN)
    said = refusal(model, islands="refuse")
    assert "aten.embedding.default x1 in types" in said
    assert "test_containers.py" in said or "sparse.py" in said
    assert "its index " in said
    tintc.compile(model, CONFIG, check="step")


def test_a_type_that_does_not_exist_is_said_in_the_models_words() -> None:
    def finish(m: Any, x: Tensor, ids: Tensor, targets: Tensor | None) -> Any:
        return with_loss(m, x + m.types(zeros(ids, "whole")), ids, targets)

    model = Decoder(finish)
    model.types = nn.Embedding(2, HIDDEN)
    assert "torch.export cannot trace Decoder: module 'torch' has no attribute" in refusal(model)


def test_a_loss_of_its_own_is_left_out() -> None:
    """Of two tokens one has a target, which the tracer takes for another case: the logits are the
    same.
    """
    model = randomized(Decoder(own_loss)).double().eval()
    simulator = tintc.compile(model, tintc.SimulatorConfig.exact())
    assert simulator.program.facts.min_tokens == 0


@pytest.mark.slow
def test_blocks_in_a_flat_sequential() -> None:
    model = randomized(nn.Sequential(Embedded(), Block(), Block(), Head())).double().eval()
    facts = tintc.compile(model, tintc.SimulatorConfig.exact()).program.facts
    assert (facts.blocks, facts.block_parts) == (2, (("1",), ("2",)))
