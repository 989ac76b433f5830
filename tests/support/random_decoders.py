"""Random decoders from a seed: lists of sublayers, kinks, writes in place, shared and aliased
weights, tied heads, layers that start at zero. Every one is a model that torch can train.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.random_parts import NORMS, Attention, Draw, FeedForward, dense

VOCAB, POSITIONS = 17, 12


class Sublayer(nn.Module):
    """One branch with its norms and its residual connection, wired as a draw says."""

    def __init__(self, draw: Draw, branch: nn.Module, norm: str, width: int) -> None:
        super().__init__()
        self.branch = branch
        self.wiring = draw.pick(
            "wiring",
            ("pre", "post", "sandwich", "scaled", "a constant", "added in place", "no residual"),
            (6, 2, 1, 2, 1, 4 * draw.writes, 1),
        )
        self.norm = NORMS[norm](width)
        if self.wiring == "sandwich":
            self.behind = NORMS[norm](width)
        if self.wiring == "scaled":
            self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.wiring == "post":
            return self.norm(x + self.branch(x))
        y = self.branch(self.norm(x))
        if self.wiring == "sandwich":
            return x + self.behind(y)
        if self.wiring == "scaled":
            return x + self.gain * y
        if self.wiring == "a constant":
            return x + 0.5 * y
        if self.wiring == "added in place":
            y += x
            return y
        return y if self.wiring == "no residual" else x + y


class Parallel(nn.Module):
    """x + attention(norm(x)) + feed-forward(norm(x)), of one norm or of two."""

    def __init__(self, draw: Draw, parts: list[nn.Module], norm: str, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        count = 2 if draw.often("a norm each", 0.4) else 1
        self.norms = nn.ModuleList(NORMS[norm](width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, part in enumerate(self.parts):
            y = y + part(self.norms[index % len(self.norms)](x))
        return y


class Block(nn.Module):
    """A list of sublayers."""

    def __init__(self, draw: Draw, order: str, norm: str, width: int, turned: bool) -> None:
        super().__init__()
        made = [
            Attention(draw, width, turned) if letter == "a" else FeedForward(draw, width)
            for letter in order.removesuffix(" at once")
        ]
        if order.endswith("at once"):
            made = [Parallel(draw, made, norm, width)]
        else:
            made = [Sublayer(draw, part, norm, width) for part in made]
        numbered = draw.often("a list of sublayers", 0.5)
        if numbered and order != "aam":  # a list of attentions in a list of blocks is refused
            self.sublayers = nn.ModuleList(made)
        else:
            self.sublayers = nn.ModuleDict({f"part_{i}": part for i, part in enumerate(made)})
        self.names = list(self.sublayers._modules)

    def forward(self, x: Tensor) -> Tensor:
        for sublayer in self.sublayers.children():
            x = sublayer(x)
        return x


class Decoder(nn.Module):
    """Embeddings -> blocks -> norm -> head, with what a draw adds around them."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.width = width = draw.random.choice((6, 8, 10))
        norm = draw.pick("norm", tuple(NORMS), (5, 2, 1, 2, 1, 1, 1, 1, 1))
        order = draw.pick(
            "sublayers", ("am", "ma", "a", "amm", "aam", "am at once"), (5, 1, 1, 1, 1, 2)
        )
        self.positions = draw.pick("positions", ("embedding", "parameter", "rotary"), (2, 1, 1))
        self.tok = nn.Embedding(VOCAB, width)
        if self.positions == "embedding":
            self.pos = nn.Embedding(POSITIONS, width)
        elif self.positions == "parameter":
            self.pos = nn.Parameter(torch.empty(1, POSITIONS, width))
        self.scale = draw.pick("embeddings times", (1.0, width**0.5), (4, 1))
        self.first = dense(draw, width, width) if draw.often("a projection in front", 0.1) else None
        turned = self.positions == "rotary"
        self.blocks = nn.ModuleList(Block(draw, order, norm, width, turned) for _ in range(2))
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, VOCAB, bias=draw.often("a bias of the head", 0.3))
        self.cap = draw.often("capped logits", 0.1)
        self.outputs = draw.pick("output", ("logits", "a tuple"), (3, 1))

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, None]:
        x = self.tok(ids)
        if self.scale != 1:
            x = x * self.scale
        if self.positions == "embedding":
            x = x + self.pos(torch.arange(ids.shape[1], device=ids.device))
        elif self.positions == "parameter":
            x = x + self.pos[:, : ids.shape[1]]
        x = x if self.first is None else self.first(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        logits = 4 * torch.tanh(logits / 4) if self.cap else logits
        return logits if self.outputs == "logits" else (logits, None)


def decoder(seed: int) -> tuple[Decoder, str]:
    """A random one in float64, and what is special about it."""
    draw = Draw(seed)
    model = Decoder(draw).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_gain = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.4 * noise)
    _share(draw, model)
    _start_at_zero(draw, model)
    return model.eval(), ", ".join(dict.fromkeys(draw.chosen)) or "plain"


def _share(draw: Draw, model: Decoder) -> None:
    """Weights with more than one use or name."""
    if draw.often("a tied head", 0.4):
        model.head.weight = model.tok.weight
    first, second = model.blocks
    kind = draw.pick("shared", tuple(_KINDS), (10, *[1] * (len(_KINDS) - 1)))
    _KINDS[kind](draw, model, first, second)


def _share_sublayer(draw: Draw, model: Decoder, first: Block, second: Block) -> None:
    second.sublayers._modules[second.names[-1]] = first.sublayers._modules[first.names[-1]]


def _share_block(draw: Draw, model: Decoder, first: Block, second: Block) -> None:
    model.blocks[1] = first


def _share_name(draw: Draw, model: Decoder, first: Block, second: Block) -> None:
    model.alias = next(first.sublayers.children())


def _same_shape(
    draw: Draw, ones: nn.Module, others: nn.Module, ndim: int
) -> tuple[nn.Parameter, nn.Module, str] | None:
    """A parameter of the first, and where another of its shape stands in the second."""
    places = [
        (owner, name, p)
        for owner in others.modules()
        for name, p in owner.named_parameters(recurse=False)
        if p.ndim == ndim
    ]
    pairs = [
        (one, owner, name)
        for one in ones.parameters()
        for owner, name, p in places
        if one.shape == p.shape and one is not p
    ]
    return draw.random.choice(pairs) if pairs else None


def _share_weight(ndim: int, within: bool) -> Callable[..., None]:
    def share(draw: Draw, model: Decoder, first: Block, second: Block) -> None:
        if (pair := _same_shape(draw, first, first if within else second, ndim)) is not None:
            one, owner, name = pair
            setattr(owner, name, one)

    return share


def _share_memory(draw: Draw, model: Decoder, first: Block, second: Block) -> None:
    """Two parameters of one memory: a step of SGD adds both gradients to it."""
    if (pair := _same_shape(draw, first, second, 2)) is not None:
        one, owner, name = pair
        getattr(owner, name).data = one.data


_KINDS: dict[str, Callable[..., None]] = {
    "nothing": lambda *_: None,
    "a sublayer": _share_sublayer,
    "a whole block": _share_block,
    "another name": _share_name,
    "a matrix of two blocks": _share_weight(2, within=False),
    "a vector of two blocks": _share_weight(1, within=False),
    "a matrix within a block": _share_weight(2, within=True),
    "a vector within a block": _share_weight(1, within=True),
    "memory": _share_memory,
}


def _start_at_zero(draw: Draw, model: Decoder) -> None:
    """Layers whose weights are all zero, as a new model may have them."""
    kind = draw.pick(
        "zero at the start", ("nothing", "branches", "gains", "kinks", "the head"), (8, 3, 2, 3, 1)
    )
    ends = {
        "nothing": (),
        "branches": (".o.weight", ".o.bias", ".down.weight", ".down.bias"),
        "gains": (".gain",),
        "kinks": (".up.weight", ".up.bias"),
        "the head": ("head.weight", "head.bias"),
    }[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name.endswith(ends):
                parameter.zero_()
