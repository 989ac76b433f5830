"""Decoders as people write them by hand: each odd one is computed like autograd does, or refused;
never computed wrong.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import tintc
from tests.support.grid import grid, some
from tests.support.models import on_all_backends
from tests.support.spelled import angles, back, causal, counted, heads, merged, rotated
from tests.support.tolerances import BACKENDS, SIMULATOR, error
from tintc import save
from tintc.compiler.verification import verify
from tintc.ir.config import PRESETS
from tintc.ir.errors import UnsupportedModelError


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.o, self.heads = (
            nn.Linear(hidden, 3 * hidden),
            nn.Linear(hidden, hidden),
            heads,
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
        )
        return self.o(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        )


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, oddity: str) -> None:
        super().__init__()
        self.n1, self.attn, self.n2 = (
            nn.LayerNorm(hidden),
            Attention(hidden, heads),
            nn.LayerNorm(hidden),
        )
        self.register_buffer("projection", torch.randn(hidden, hidden))
        self.fcA, self.down, self.oddity = (
            nn.Linear(hidden, 2 * hidden),
            nn.Linear(2 * hidden, hidden),
            oddity,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x.detach() if self.oddity == "detached" else x))
        if self.oddity == "fixed projection":
            x = x + F.linear(x, self.projection)
        with torch.set_grad_enabled(self.oddity != "no_grad"):
            u = self.fcA(self.n2(x))
        return x + self.down(F.gelu(u))


class Decoder(nn.Module):
    def __init__(
        self, oddity: str = "", hidden: int = 8, vocab: int = 17, positions: int = 32
    ) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, hidden), nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(Block(hidden, 2, oddity) for _ in range(2))
        self.mixers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))
        self.lnF, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocab, bias=False)
        self.inner_lr = nn.Parameter(torch.ones(vocab))
        self.register_buffer("sines", torch.randn(positions, hidden), persistent=False)
        self.oddity = oddity
        if oddity == "weight shared":
            self.blocks[1].fcA.weight = self.blocks[0].fcA.weight
        if oddity == "bias shared by norm and linear":
            self.blocks[1].n1.bias = self.blocks[1].attn.o.bias
        if oddity == "bias shared with a gain":
            self.blocks[1].n1.weight = self.blocks[0].attn.o.bias

    def forward(self, ids: Tensor) -> Tensor | list[Tensor]:
        index = torch.arange(ids.shape[1], device=ids.device)
        index = {"wrapped": index % 24, "clamped": index.clamp(max=20)}.get(self.oddity, index)
        table = self.tok.weight * 2 if self.oddity == "computed table" else self.tok.weight
        x = F.embedding(ids, table) + (
            F.embedding(index, self.sines) if self.oddity == "foreign table" else self.pos(index)
        )
        for block, mixer in zip(self.blocks, self.mixers, strict=True):
            x = block(x)
            if self.oddity == "between blocks":
                x = x + F.gelu(mixer(x))
        long = {
            "longer": ids.shape[1] > 20,
            "even": ids.shape[1] % 2 == 0,
            "large batch": ids.shape[0] > 4,
        }.get(self.oddity, False)
        x = self.lnF(self.blocks[0](x) if long else x)
        if self.oddity == "hidden states":
            return x
        if self.oddity == "named like an input":
            return F.linear(x, self.head.weight, self.inner_lr)
        return [self.head(x)] if self.oddity == "a list" else self.head(x)


def decoder(oddity: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(oddity).double()


@pytest.mark.parametrize(
    "oddity",
    [
        "",
        "weight shared",
        "bias shared by norm and linear",
        "named like an input",
        "a list",
        "longer",
    ],
)
def test_equals_autograd(oddity: str, tmp_path: Path) -> None:
    model = decoder(oddity)
    simulator = tintc.compile(model, tintc.SimulatorConfig.exact(inner_lr=0.02, steps=2))
    assert verify(simulator, tokens=18).agrees
    ids = torch.arange(2 * 18).reshape(2, 18) % 17
    expected = model(ids)
    found = simulator.predict_initial(ids)
    assert (
        float(
            (found - (expected[0] if isinstance(expected, list) else expected)).detach().abs().max()
        )
        < SIMULATOR[torch.float64]
    )
    loaded = tintc.load(save(simulator, tmp_path / "artifact"))
    assert torch.equal(loaded.predict_initial(ids), found)


SHARED = (
    "weight shared",
    "bias shared by norm and linear",
    "bias shared with a gain",
    "named like an input",
    "fixed projection",
)


@pytest.mark.slow
@grid(together=1, oddity=SHARED, preset=PRESETS)
def test_both_back_ends_agree(oddity: str, preset: str) -> None:
    """Shared weights learn from both of their uses, in prefix tokens too; a buffer stays as it
    is.
    """
    config = tintc.SimulatorConfig.preset(preset, inner_lr=0.02, steps=2)
    fused, transformer = on_all_backends(decoder(oddity), config).values()
    ids, train = (
        torch.arange(2 * 18).reshape(2, 18) % 17,
        (torch.arange(18) < 11).long().expand(2, 18),
    )
    with torch.inference_mode():
        assert (
            error(transformer(ids, train).logits, fused(ids, train).logits)
            < BACKENDS[torch.float64]
        )
        found, expected = (
            transformer.updated_state_dict(ids, train, 1),
            fused.updated_state_dict(ids, train, 1),
        )
    assert set(found) == set(expected)
    assert all(error(found[name], expected[name]) < BACKENDS[torch.float64] for name in expected)


class Renamed(nn.Module):
    """A decoder whose parts outside of blocks have names of a user's choice."""

    def __init__(self, token: str, position: str, norm: str) -> None:
        super().__init__()
        self.names = token, position, norm
        for name, part in zip(
            self.names, (nn.Embedding(17, 8), nn.Embedding(32, 8), nn.LayerNorm(8)), strict=True
        ):
            setattr(self, name, part)
        self.blocks, self.head = (
            nn.ModuleList(Block(8, 2, "") for _ in range(2)),
            nn.Linear(8, 17, bias=False),
        )

    def forward(self, ids: Tensor) -> Tensor:
        token, position, norm = (getattr(self, name) for name in self.names)
        x = token(ids) + position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(norm(x))


NAMED_CONFIG = tintc.SimulatorConfig.exact(inner_lr=0.02)
NAMED_IDS = torch.arange(18).reshape(1, 18) % 17


@cache
def plainly_named() -> tuple[list[Tensor], Tensor]:
    """(weights in order, the simulator's logits)."""
    plain = Renamed("tok", "pos", "ln").double()
    simulator = tintc.compile(plain, NAMED_CONFIG)
    with torch.inference_mode():
        logits = simulator(NAMED_IDS, torch.ones_like(NAMED_IDS)).logits
    return list(plain.state_dict().values()), logits


@pytest.mark.parametrize(
    "names",
    [
        ("items", "pos", "ln"),
        ("tok", "keys", "pop"),
        ("tok", "code", "graph"),
        ("tok", "pos", "segment"),
        ("tok", "targets", "inner_lr"),
        ("stream", "position_code", "page_0"),
        ("logits", "initial_logits", "updates"),
    ],
    ids="-".join,
)
def test_parts_may_have_any_name(names: tuple[str, str, str]) -> None:
    """Names of inputs, of a program's own variables, and of methods of torch's containers; on both
    back ends.
    """
    model, (weights, expected) = Renamed(*names).double(), plainly_named()
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    for backend, simulator in on_all_backends(model, NAMED_CONFIG).items():
        found = simulator(NAMED_IDS, torch.ones_like(NAMED_IDS)).logits
        assert error(found, expected) < BACKENDS[torch.float64], backend


def test_a_buffer_is_no_weight_and_is_not_trained() -> None:
    simulator = tintc.compile(
        decoder("fixed projection"), tintc.SimulatorConfig.exact(inner_lr=0.02)
    )
    ids = torch.arange(18).reshape(1, 18) % 17
    before, after = (
        simulator.prefix.tensors(),
        simulator.updated_state_dict(ids, torch.ones_like(ids)),
    )
    assert torch.equal(after["blocks.0.projection"], before["blocks.0.projection"])
    assert not torch.equal(after["blocks.0.fcA.weight"], before["blocks.0.fcA.weight"])


def test_a_models_own_limit_of_length_is_the_simulators() -> None:
    """Beyond 20 tokens this model takes a branch that capture did not see."""
    simulator = tintc.compile(decoder("longer"))
    assert simulator.program.facts.longest == 20
    ids = torch.zeros(1, 21, dtype=torch.int64)
    for positions in (None, torch.arange(21)[None] % 7):
        with pytest.raises(tintc.InputError, match="has 21 tokens; this simulator takes 20"):
            simulator.predict_initial(ids, position_ids=positions)


@pytest.mark.parametrize(
    ("oddity", "message"),
    [
        ("detached", r"aten\.detach\.default x2 in blocks\.0 .*stops the gradient"),
        ("no_grad", r"wrap_with_set_grad_enabled x2 .*_hand_written\.py:\d+\).*stops the gradient"),
        ("wrapped", "neither the token ids nor consecutive positions"),
        ("clamped", "neither the token ids nor consecutive positions"),
        ("computed table", "its table is not in the state dict"),
        ("foreign table", "its table is not in the state dict"),
        ("even", "computes different things for different batches or lengths"),
        ("large batch", "computes different things for different batches or lengths"),
        ("hidden states", "returns 8 numbers a position; expected logits over its 17 tokens"),
    ],
)
def test_refused(oddity: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        tintc.compile(decoder(oddity), islands="refuse")


@pytest.mark.slow
def test_a_table_with_more_rows_than_the_config_names_tokens() -> None:
    """For pictures, or a first token; the head has a column for every token that is named."""
    model = decoder("")
    model.tok = nn.Embedding(21, 8).to(model.head.weight.dtype)
    with pytest.raises(UnsupportedModelError, match=r"17 numbers a position.* over its 21 tokens"):
        tintc.compile(model)
    model.config = SimpleNamespace(vocab_size=17)  # type: ignore[assignment]
    simulator = tintc.compile(model, check="step")
    assert simulator.program.facts.vocab_size == 17
    with pytest.raises(tintc.InputError, match="this model's tokens are 0 to 16"):
        simulator.predict_initial(torch.tensor([[1, 17]]))


class Odd(nn.Module):
    """A block that computes `change(self, x)`, with a few layers for it to use."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.wide, self.norm, self.out = (
            change,
            nn.Linear(8, 24),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
        )
        self.gain, self.head_gain = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, x)

    def attend(
        self, x: Tensor, change: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y, **options: Any
    ) -> Tensor:
        q, k, v = (heads(y) for y in self.wide(x).chunk(3, -1))
        return self.out(
            merged(
                F.scaled_dot_product_attention(
                    change(q, x), change(k, x), v, **(options or {"is_causal": True})
                )
            )
        )


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


ODD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a gain twice": lambda m, x: x + m.out(rms(x) * m.gain) * m.gain,
    "a gain for two norms": lambda m, x: x + m.out(rms(x) * m.gain) + m.attend(rms(x) * m.gain),
    "a square": lambda m, x: x + m.out(m.norm(x)) * m.out(m.norm(x)),
    "a gate of two roots": lambda m, x: x + F.silu(m.out(x)) * m.norm(x),
    "a layer twice": lambda m, x: x + m.out(F.gelu(m.out(m.norm(x)))),
    "a multiple of a residual": lambda m, x: 0.5 * x + 0.3 * m.attend(m.norm(x)),
    "parallel branches": lambda m, x: x + m.attend(m.norm(x)) + m.out(F.relu(m.norm(x))),
    "a rotation": lambda m, x: x + m.attend(m.norm(x), lambda q, x: rotated(q, *angles(x))),
    "no rotation": lambda m, x: (
        x
        + m.attend(x, lambda q, x: rotated(q, angles(x)[0] * 2, angles(x)[1] * counted(x)[:, None]))
    ),
    "normed heads": lambda m, x: x + m.attend(x, lambda q, x: rms(q) * (1 + m.head_gain)),
    "normed, then turned": lambda m, x: (
        x + m.attend(x, lambda q, x: rotated(rms(q) * m.head_gain, *angles(x)))
    ),
    "a window": lambda m, x: x + m.attend(m.norm(x), attn_mask=causal(x).triu(-3)),
    "ALiBi": lambda m, x: (
        x
        + m.attend(
            m.norm(x), attn_mask=torch.where(causal(x), -0.25 * back(x).double(), -torch.inf)
        )
    ),
    "a gate by turns": lambda m, x: (
        x + m.wide(x)[..., ::3] * torch.sigmoid(m.wide(x)[..., 1::3]) + F.gelu(m.wide(x)[..., 2::3])
    ),
    "a scale and a shift": lambda m, x: x + m.out(m.norm(x * m.gain)),
    "after the sum": lambda m, x: m.norm(x + m.attend(x)) * m.gain,
}


@some(
    ("name", "preset"),
    [(name, preset) for name in ODD for preset in ("exact", "paper")],
    default=[*((name, "exact") for name in ODD), ("after the sum", "paper")],
)
def test_odd_blocks_learn_as_autograd_has_it(name: str, preset: str) -> None:
    """`paper` compares the first logits and both forward passes only; `exact` every update too."""
    blocks = nn.ModuleList(Odd(ODD[name]) for _ in range(2))
    model = nn.Sequential(
        nn.Embedding(17, 8), nn.Sequential(*blocks), nn.LayerNorm(8), nn.Linear(8, 17)
    ).double()
    if name == "a scale and a shift":
        blocks[1].norm = blocks[0].norm  # shared by both blocks
    simulator = tintc.compile(model, tintc.SimulatorConfig.preset(preset, inner_lr=0.02, steps=2))
    found = verify(simulator, tokens=14)
    assert (
        found.agrees if preset == "exact" else found.initial_logits_error < SIMULATOR[torch.float64]
    )


def test_positions_of_a_callers_choice_do_not_lengthen_a_window() -> None:
    """A window of 4096 is none as far as masks are looked at; a longer sequence would show it,
    wherever its positions restart.
    """
    config = transformers.MistralConfig(
        vocab_size=17,
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        intermediate_size=8,
        sliding_window=4096,
        max_position_embeddings=8192,
    )
    simulator = tintc.compile(
        transformers.MistralForCausalLM(config), tintc.SimulatorConfig.exact()
    )
    ids = torch.zeros(1, 4097, dtype=torch.int64)
    with pytest.raises(tintc.InputError, match="has 4097 tokens; this simulator takes 4096"):
        simulator.predict_initial(ids, position_ids=torch.arange(4097)[None] % 3000)
