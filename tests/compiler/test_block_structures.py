"""Blocks of models that have no one list of equal blocks: which weights learn, compared with one
exact step by torch.autograd on all of them, and what `layers` counts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tintc
from tests.compiler.test_islands import RATE, D, H, V, merged, stepped
from tests.support.grid import some
from tests.support.models import randomized
from tests.support.tolerances import SIMULATOR, error

LIMIT = SIMULATOR[torch.float64]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D // H, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


class Heads(nn.Module):
    """Each head a module, as textbooks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.ModuleList(Head() for _ in range(H)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([head(x) for head in self.heads], -1))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.mish(self.up(x)))


class Sub(nn.Module):
    """x + f(norm(x))."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(D), f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x))


class Clipped(Attention):
    """Attention that no pass recognises."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = F.softplus(q @ k.mT).masked_fill(later, 0.0)
        return self.out(merged(weights @ v / (1 + weights.sum(-1, keepdim=True))))


class NormedBehind(nn.Module):
    """x + norm(f(x))."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(D), f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.f(x))


class Length(nn.Module):
    """A norm that no pass recognises."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "a": Attention, "h": Heads, "f": Feed, "c": Clipped
}  # fmt: skip


def subs(kinds: str) -> list[nn.Module]:
    return [Sub(KINDS[kind]()) for kind in kinds]


def blocks(count: int) -> list[nn.Module]:
    return [nn.Sequential(*subs("af")) for _ in range(count)]


class Model(nn.Module):
    """run: (its own modules, x) -> x."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **own: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.token, self.last, self.head = nn.Embedding(V, D), nn.LayerNorm(D), nn.Linear(D, V)
        for name, module in own.items():
            setattr(self, name, module)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.last(self.run(self, self.token(ids))))


def in_order(*names: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        for name in names:
            x = m.get_submodule(name)(x)
        return x

    return run


def listed(kinds: str) -> nn.Module:
    return Model(in_order("layers"), layers=nn.Sequential(*subs(kinds)))


def pairs(m: nn.Module, x: Tensor) -> Tensor:
    """An attention of one list, a feed-forward of another."""
    for a, f in zip(m.a, m.f, strict=True):
        x = f(a(x))
    return x


def pairs_normed_behind(m: nn.Module, x: Tensor) -> Tensor:
    for i, (a, f) in enumerate(zip(m.a, m.f, strict=True)):
        x = m.norms[2 * i](x + a(x))
        x = m.norms[2 * i + 1](x + f(x))
    return x


def side_by_side(m: nn.Module, x: Tensor) -> Tensor:
    for a, f, norm in zip(m.a, m.f, m.norms, strict=False):
        y = norm(x)
        x = x + a(y) + f(y)
    return x


def weights(m: nn.Module, x: Tensor) -> Tensor:
    """Of no modules at all."""
    for qkv, out, up in zip(m.qkv, m.out, m.up, strict=True):
        q, k, v = (
            y.unflatten(-1, (H, -1)).transpose(1, 2) for y in F.linear(x.tanh(), qkv).chunk(3, -1)
        )
        y = merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + F.linear(y, out)
        x = x + F.linear(F.rms_norm(x, (D,)), up)
    return x


def matrices(rows: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.randn(rows, D) / 4) for _ in range(2))


def two_lists(run: Callable[[nn.Module, Tensor], Tensor], count: int) -> nn.Module:
    return Model(
        run,
        a=nn.ModuleList(Attention() for _ in range(count)),
        f=nn.ModuleList(Feed() for _ in range(count)),
        norms=nn.ModuleList(nn.LayerNorm(D) for _ in range(2 * count)),
    )


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "attention, feed-forward": (lambda: listed("af"), 1),
    "feed-forward, attention": (lambda: listed("fa"), 1),
    "in turn": (lambda: listed("afafaf"), 3),
    "in turn, feed-forward first": (lambda: listed("fafa"), 2),
    "feed-forward on both sides": (lambda: listed("faffaf"), 2),
    "irregular": (lambda: listed("aafff"), 2),
    "heads as modules": (lambda: listed("hfhf"), 2),
    "two lists": (
        lambda: Model(
            pairs, a=nn.ModuleList(subs("aa")), f=nn.ModuleList(subs("ff"))
        ),
        2,
    ),
    "two lists of one": (
        lambda: Model(pairs, a=nn.ModuleList(subs("a")), f=nn.ModuleList(subs("f"))), 1
    ),
    "lists of norms": (lambda: two_lists(pairs_normed_behind, 2), 2),
    "side by side": (lambda: two_lists(side_by_side, 2), 2),
    "attributes": (
        lambda: Model(
            in_order("a1", "f1", "a2", "f2"),
            **dict(zip(("a1", "f1", "a2", "f2"), subs("afaf"), strict=True)),
        ),
        2,
    ),
    "two stacks": (
        lambda: Model(
            in_order("low", "high"), low=nn.Sequential(*blocks(2)), high=nn.Sequential(*blocks(1))
        ),
        3,
    ),
    "stacks of stacks": (
        lambda: Model(
            in_order("layers"),
            layers=nn.Sequential(nn.Sequential(*blocks(2)), nn.Sequential(*blocks(2))),
        ),
        4,
    ),
    "lists of weights": (
        lambda: Model(weights, qkv=matrices(3 * D), out=matrices(D), up=matrices(D)), 2
    ),
    "no attention": (lambda: listed("f"), 1),
    "attention in islands, in turn": (lambda: listed("cfcf"), 2),
    "last norm in an island": (
        lambda: Model(in_order("layers"), layers=nn.Sequential(*blocks(2)), last=Length()), 2
    ),
    "embedding in an island": (
        lambda: Model(
            lambda m, x: m.get_submodule("layers")(torch.sin(x)),
            layers=nn.Sequential(*(NormedBehind(KINDS[kind]()) for kind in "afaf")),
        ),
        2,
    ),
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    return randomized(STRUCTURES[name][0]()).double().eval()


@some(
    "name",
    STRUCTURES,
    default=[
        *("attention, feed-forward", "in turn, feed-forward first", "heads as modules"),
        *("two lists of one", "lists of norms", "side by side", "two stacks", "lists of weights"),
        *("attention in islands, in turn", "last norm in an island", "embedding in an island"),
    ],
)
def test_all_between_embedding_and_head_learns(name: str) -> None:
    model = made(name)
    simulator = tintc.compile(model, tintc.SimulatorConfig.exact(inner_lr=RATE), check="none")
    facts = simulator.program.facts
    assert (facts.blocks, facts.trained_blocks) == (STRUCTURES[name][1],) * 2
    ids = torch.randint(V, (1, 9), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    trained = {
        n for n, _ in model.named_parameters() if not n.startswith(("token.", "head."))
    } - ({f"norms.{i}.{n}" for i in (2, 3) for n in ("weight", "bias")}
         if name == "side by side" else set())  # fmt: skip
    wanted = stepped(model, trained, ids[0], ones[0], 1)
    with torch.inference_mode():
        state = simulator.updated_state_dict(ids, ones, 0)
        logits = simulator(ids, ones).logits
    assert {n for n, p in model.named_parameters() if not torch.equal(state[n], p)} == trained
    assert all(error(state[n], wanted[n]) < LIMIT for n in wanted)
    with torch.no_grad():
        expected = torch.func.functional_call(model, wanted, (ids,))
    assert error(logits, expected) < LIMIT


@pytest.mark.parametrize(
    ("name", "lower", "higher"),
    [
        ("in turn", ("layers.0.", "layers.1."), ("layers.4.", "layers.5.")),
        ("in turn, feed-forward first", ("layers.0.", "layers.1."), ("layers.2.", "layers.3.")),
        ("lists of norms", ("a.0.", "f.0.", "norms.0.", "norms.1."), ("a.1.", "f.1.", "norms.3.")),
        ("two stacks", ("low.1.",), ("high.0.",)),
    ],
)
def test_layers_counts_blocks(name: str, lower: tuple[str, ...], higher: tuple[str, ...]) -> None:
    config = tintc.SimulatorConfig.exact(layers=1)
    program = tintc.compile(made(name), config, check="none").program
    trained = {s.parameter for s in program.layout.prefix.values() if s.trainable}
    assert not [n for n in trained if n.startswith(lower)]
    assert all(any(n.startswith(part) for n in trained) for part in (*higher, "last."))
    assert program.facts.place(f"{higher[0]}x")[0] == str(program.facts.blocks - 1)


def test_patterns_override() -> None:
    config = tintc.SimulatorConfig.exact(train=("layers.1.*",))
    program = tintc.compile(made("in turn"), config, check="none").program
    trained = {s.parameter for s in program.layout.prefix.values() if s.trainable}
    assert trained and all(n.startswith("layers.1.") for n in trained)
    assert (program.facts.blocks, program.facts.trained_blocks) == (3, 1)


def test_equal_blocks_share_constants() -> None:
    """The transformer back end's modules of the second block are those of the first."""
    torch.manual_seed(1)
    layers = [nn.Sequential(*subs("a")), nn.Sequential(*subs("a"))]
    model = Model(in_order("low", "high"), low=layers[0], high=layers[1])
    simulator = tintc.compile(
        randomized(model).double().eval(),
        tintc.SimulatorConfig.exact(),
        backend="transformer",
        share="layers",
        check="none",
    )
    assert simulator.structure is not None
    assert simulator.structure.numbers("layers") < simulator.structure.numbers("none")
