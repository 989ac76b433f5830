"""Decoders with parts that no pass recognises: one or more exact steps equal torch.autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import tintc
from tests.support.grid import some
from tests.support.models import randomized
from tests.support.tolerances import SIMULATOR, error
from tintc.ir.dialect import is_tint
from tintc.ir.ops.island import island_forward

D, H, V, RATE = 16, 2, 23, 0.05
LIMIT = SIMULATOR[torch.float64]
Change = Callable[["Part", Tensor, Tensor], Tensor]


class Part(nn.Module):
    """A residual block: `attend` and `feed` compute its two branches."""

    def __init__(self, attend: Change, feed: Change) -> None:
        super().__init__()
        self.attend, self.feed = attend, feed
        self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)
        self.gain, self.sink = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(H))
        self.number = nn.Parameter(torch.tensor(0.7))
        self.by_head = nn.Parameter(torch.randn(H, D, D // H) / 4)
        self.into = nn.Parameter(torch.randn(D, 24) / 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = x + self.attend(self, self.norm(x), ids)
        return x + self.feed(self, self.norm2(x), ids)


class Decoder(nn.Module):
    def __init__(self, attend: Change, feed: Change, embed: Any = None) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(V, D), nn.Embedding(64, D)
        self.blocks = nn.ModuleList(Part(attend, feed) for _ in range(2))
        self.last, self.head, self.embed = nn.LayerNorm(D), nn.Linear(D, V), embed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        x = x if self.embed is None else self.embed(self, x, ids)
        for block in self.blocks:
            x = block(x, ids)
        return self.head(self.last(x))


def split(m: Part, x: Tensor) -> list[Tensor]:
    """q, k, v: (B, H, T, E)."""
    return [y.unflatten(-1, (H, -1)).transpose(1, 2) for y in m.qkv(x).chunk(3, -1)]


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def attention(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    return m.out(merged(F.scaled_dot_product_attention(*split(m, x), is_causal=True)))


def feed(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x)))


def hidden(scores: Tensor) -> Tensor:
    later = torch.ones(*scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -torch.inf)


def by_einsum(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = split(m, x)
    scores = hidden(torch.einsum("bhie,bhje->bhij", q, k) / 3)
    return m.out(merged(torch.einsum("bhij,bhje->bhie", scores.softmax(-1), v)))


def with_sink(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = split(m, x)
    scores = hidden(q @ k.mT / 3)
    sink = m.sink.view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
    return m.out(merged(torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v))


def heads_of_weights(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    q = torch.einsum("btd,hde->bhte", x, m.by_head)
    _, k, v = split(m, x)
    return m.out(merged(hidden(q @ k.mT).softmax(-1) @ v))


def running_mean(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    return m.out(x.cumsum(1) / count[:, None])


def convolved(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    weight = m.by_head.flatten().view(D, 1, -1)[..., :3]
    return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), weight, groups=D).transpose(1, 2)


def tapped(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    """A convolution whose taps are each token's own, over windows that `unfold` reads."""
    windows = F.pad(x.transpose(1, 2), (2, 0)).unfold(-1, 3, 1).transpose(1, 2)
    return feed(m, (windows * (m.into.T[:3, :D].T + m.number * x[..., None])).sum(-1), ids)


def turned(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = split(m, x)
    angle = torch.arange(x.shape[1])[:, None] * 10.0 ** -torch.arange(0, 1, 2 * H / D)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1)
    turn = turn.view(x.shape[1], -1, 2, 2)
    q, k = ((y.unflatten(-1, (-1, 1, 2)) * turn).sum(-1).flatten(3) for y in (q, k))
    return m.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def into_copy(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    y = m.up(x).clone()
    y[..., 3:9] = x[..., :6].sin() * m.number
    return m.down(y)


def chosen(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    """Two of eight rows for each token: chosen without gradients, weighed with them."""
    scores = x @ m.by_head[0]
    with torch.no_grad():
        places = scores.topk(2, -1).indices
    weights = scores.softmax(-1).gather(-1, places)
    return (weights[..., None] * m.into.T[:8][places]).sum(-2)


def in_one_chunk(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    """Padded to a chunk of 16 tokens, of which there is one: the model takes no more."""
    chunk = F.pad(x, (0, 0, 0, -x.shape[1] % 16)).view(x.shape[0], 16, D)
    return feed(m, chunk.cumsum(1)[:, : x.shape[1]], ids)


def streams(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    """Two streams on an axis of their own, read before and behind a recognised layer."""
    first = m.out(x)
    both = torch.stack([first, first / (1 + first.abs())])
    return (both * feed(m, both.sum(0), ids).sigmoid()).prod(0)


def streams_in_a_row(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    """Two streams one behind the other on the axis of the tokens, normed and fed together."""
    both = feed(m, m.norm(torch.cat([x, m.out(x)], 1)), ids)
    first, second = both.split(x.shape[1], 1)
    return first * second.tanh()


def rows_of_a_kind(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    """Each kind of token its own layers, which read the rows of that kind alone."""
    y = torch.zeros_like(x)
    for kind in range(2):
        here = ids % 2 == kind
        y[here] = feed(m, x[here], ids) * m.gain[kind]
    return y


def cut_by_counts(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    """Two of eight weights for each token: rows sorted by weight, cut by how many each has."""
    flat = x.flatten(0, 1)
    scores = flat @ m.by_head[0]
    best = scores.topk(2, -1)
    counts = torch.zeros_like(scores).scatter(1, best.indices, 1).long().sum(0).tolist()
    order = best.indices.flatten().sort(0).indices
    rows = order.div(2, rounding_mode="trunc")
    pieces = zip(flat[rows].split(counts), m.into.T[:, :, None], strict=False)
    y = torch.cat([F.linear(piece, weight.expand(-1, D).sin()) for piece, weight in pieces])
    y = y * best.values.softmax(-1).flatten()[order][:, None]
    return torch.zeros_like(flat).index_add(0, rows, y).view(x.shape)


def one_token_before(m: Part, x: Tensor, ids: Tensor) -> Tensor:
    """A layer of one token, none of the text's, in front of the others."""
    first = m.out(x.new_zeros(x.shape[0], 1, D))
    return feed(m, x * torch.cat([first, m.out(x)[:, :-1]], 1), ids)


def replaced(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """One id stands for another, as for pictures in a text."""
    ids = ids.clone()
    ids[ids == 3] = 0
    return m.token(ids)


def before(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


ATTEND: dict[str, Change] = {
    "einsum": by_einsum,
    "sink": with_sink,
    "weights of heads": heads_of_weights,
    "running mean": running_mean,
    "convolution": convolved,
    "taps of tokens": tapped,
    "rotation by matrices": turned,
    "gated": lambda m, x, ids: torch.sigmoid(m.number * x) * attention(m, x, ids),
    "normed": lambda m, x, ids: attention(m, F.normalize(x, dim=-1) * m.gain, ids),
}
FEED: dict[str, Change] = {
    "mish": lambda m, x, ids: m.down(F.mish(m.up(x))),
    "glu": lambda m, x, ids: m.down(F.glu(m.up(x).repeat(1, 1, 2), -1)),
    "leaky square": lambda m, x, ids: m.down(F.leaky_relu(m.up(x), 0.5).square()),
    "transposed": lambda m, x, ids: m.down(F.elu(F.linear(x, m.into.T))),
    "learned number": lambda m, x, ids: m.number * feed(m, x, ids),
    "token before": lambda m, x, ids: feed(m, x + torch.sigmoid(m.gain) * before(x), ids),
    "written norm": lambda m, x, ids: feed(m, x / (x.std(-1, keepdim=True) + 1e-5) * m.gain, ids),
    "written into": into_copy,
    "rows chosen without gradients": chosen,
    "one chunk": in_one_chunk,
    "two streams": streams,
    "streams in a row": streams_in_a_row,
    "one token before": one_token_before,
    "rows of a kind": rows_of_a_kind,
    "cut by counts": cut_by_counts,
    "sizes of another": lambda m, x, ids: m.down(torch.ones_like(m.up(x)).cumsum(-1) * x[..., :1]),
    "some tokens hidden": lambda m, x, ids: m.down(
        m.up(x.sin()) * (ids > 2)[..., None].to(x.dtype)
    ),
    "by token": lambda m, x, ids: feed(m, x * (1 + (ids % 3)[..., None] * m.number), ids),
}
EMBED: dict[str, Any] = {
    "a part of the first": lambda m, x, ids: torch.cat((x[:, :1], x[:, 1:] + 0.3 * x[:, :-1]), 1),
    "a token replaced": replaced,
    "token type": lambda m, x, ids: x + F.embedding(torch.zeros_like(ids), m.position.weight * 0.5),
}


def stepped(
    model: nn.Module, names: set[str], ids: Tensor, mask: Tensor, steps: int
) -> dict[str, Tensor]:
    """Weights after the steps on one sequence, (T,), by torch.autograd and SGD."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(steps):
        given = {n: w.requires_grad_() for n, w in weights.items()}
        logits = functional_call(model, given, (ids[None],))[0]
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        grads = torch.autograd.grad(
            (losses * mask[1:]).sum(), list(given.values()), allow_unused=True
        )
        moved = zip(given.items(), grads, strict=True)
        weights = {
            n: (w - RATE * g if n in names and g is not None else w).detach() for (n, w), g in moved
        }
    return weights


def compare(model: nn.Module, steps: int, batch: int, padded: str) -> tintc.Simulator:
    """Initial logits, updated weights and logits, of several sequences with padding."""
    config = tintc.SimulatorConfig.exact(inner_lr=RATE, steps=steps)
    simulator = tintc.compile(model, config, check="none")
    generator = torch.Generator().manual_seed(3)
    tokens = 11
    ids = torch.randint(V, (batch, tokens), generator=generator)
    looks = torch.ones(batch, tokens, dtype=torch.long)
    train = torch.zeros(batch, tokens, dtype=torch.long)
    train[:, :7] = 1
    for b in range(batch if padded else 0):
        if padded == "left":
            looks[b, :b] = 0
        else:
            looks[b, tokens - b :] = 0
    with torch.inference_mode():
        found = simulator(ids, train, attention_mask=looks, return_initial=True)
        short = simulator(ids, train, attention_mask=looks).logits
    assert error(short, found.logits) < LIMIT
    trained = {s.parameter for s in simulator.program.layout.prefix.values() if s.trainable}
    assert {n for n, _ in model.named_parameters() if n.startswith("blocks.")} >= trained - {
        "last.weight", "last.bias"
    }  # fmt: skip
    for b in range(batch):
        kept = looks[b].bool()
        own, mask = ids[b, kept], train[b, kept]
        weights = stepped(model, trained, own, mask, steps)
        with torch.no_grad():
            initial, final = model(own[None])[0], functional_call(model, weights, (own[None],))[0]
        state = simulator.updated_state_dict(ids, train, b, attention_mask=looks)
        assert error(found.initial_logits[b, kept], initial) < LIMIT
        assert error(found.logits[b, kept], final) < LIMIT
        assert all(error(state[n], weights[n]) < LIMIT for n in weights)
        assert error(initial, final) > 1e-3  # there was something to compare
    return simulator


def islands(simulator: tintc.Simulator) -> int:
    return sum(is_tint(node, island_forward) for node in simulator.program.graph.nodes)


PARTS = [
    *(("attend", name) for name in ATTEND),
    *(("feed", name) for name in FEED),
    *(("embed", name) for name in EMBED),
]


def decoder(kind: str, name: str) -> nn.Module:
    torch.manual_seed(1)
    model = Decoder(
        ATTEND[name] if kind == "attend" else attention,
        FEED[name] if kind == "feed" else feed,
        EMBED[name] if kind == "embed" else None,
    )
    return randomized(model).double().eval()


@some(
    ("kind", "name"),
    PARTS,
    default=[
        *(("attend", name) for name in ("sink", "weights of heads", "taps of tokens", "gated")),
        *(("feed", name) for name in ("mish", "transposed", "token before", "by token")),
        *(("feed", name) for name in ("rows chosen without gradients", "one chunk", "two streams")),
        *(("feed", name) for name in ("streams in a row", "rows of a kind")),
        *(("embed", name) for name in ("token type", "a token replaced")),
    ],
)
def test_steps_equal_autograds(kind: str, name: str) -> None:
    simulator = compare(decoder(kind, name), steps=2, batch=3, padded="left")
    assert islands(simulator)


@some(
    ("padded", "steps"),
    [("", 1), ("", 2), ("right", 1), ("right", 2)],
    default=[("", 2), ("right", 1)],
)
def test_one_sequence_and_padding_behind(padded: str, steps: int) -> None:
    compare(decoder("attend", "sink"), steps=steps, batch=3 if padded else 1, padded=padded)
