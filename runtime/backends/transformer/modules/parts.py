"""The parts that every module of the transformer back end is made of, and nothing else: split maps,
linear attention, gates, residual connections, and reads and writes of named coordinate ranges.

Legend: B sequences, T input tokens, K prefix tokens, A heads, E coordinates a head, W width of a
range. The *stream* is (B, T, coordinates): all input tokens with all coordinates that
`assign_memory_slots` laid out. A *page* is (K, D_sim), or (B, K, D_sim) after a descent. The
position *code* is (K + 1, 2 d): prefix token j has a one-hot of j and then ones, an input token
(the last row) zeros and then ones. Structural constants are parameters that need no gradient; all
are 0, 1, -1 or a gate's 40, exact in every dtype. Scales (of attention, of a finite difference) and
eps are constants of the module, not parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintc.ir.ops.rates import along

# tanh of it is 1 to the last bit of float64.
_OPEN = 40.0
_MAPS = ("query", "key", "value", "output")


class Range(NamedTuple):
    """Coordinates start <= c < stop of the input tokens; of the first `tokens` of them, or of all
    (None).
    """

    start: int
    stop: int
    tokens: int | None


class Place(NamedTuple):
    """Prefix tokens first <= j < last of a page, and their coordinates start <= c < stop."""

    first: int
    last: int
    start: int
    stop: int


def position_code(
    tokens: int, width: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """The position embeddings of the simulator's own tokens, (K + 1, 2 d): see the legend."""
    places = torch.eye(tokens + 1, width, dtype=dtype, device=device)
    places[tokens] = 0
    return torch.cat([places, torch.ones_like(places)], -1)


def read(stream: Tensor, where: Range) -> Tensor:
    """(B, T, W): a range of coordinates. Copied while torch records, so that a later write does not
    keep a whole stream.
    """
    found = stream[:, : where.tokens, where.start : where.stop]
    return found.clone() if stream.requires_grad else found


def copied(stream: Tensor, where: Range) -> Tensor:
    """What a range holds now, for a result that later writes must not change."""
    return stream[:, : where.tokens, where.start : where.stop].clone()


def split(x: Tensor, parts: int, width: int) -> Tensor:
    """(..., W) -> (..., parts, width), padded with zeros."""
    return torch.unflatten(F.pad(x, (0, parts * width - x.shape[-1])), -1, (parts, width))


def regroup(x: Tensor, parts: int) -> Tensor:
    """(..., I, E) -> (..., parts, I * E / parts)."""
    return x if x.shape[-2] == parts else torch.unflatten(x.flatten(-2), -1, (parts, -1))


def groups(x: Tensor, parts: int, used: int, width: int) -> Tensor:
    """(..., W) -> (..., parts, width): `used` numbers a part, then zeros."""
    return F.pad(split(x, parts, used), (0, width - used))


def join(x: Tensor, used: int, size: int) -> Tensor:
    """(..., parts, width) -> (..., size): the first `used` numbers of each part, side by side."""
    return x[..., :used].flatten(-2)[..., :size]


def blank(prompt: Tensor, code: Tensor, width: int) -> Tensor:
    """The stream before the first operator: zeros for every token of `prompt`, (B, T)."""
    return code.new_zeros(*prompt.shape, width)


def pattern(rows: list[list[float]], width: int) -> Tensor:
    """Coefficients (A, I) -> the weight (A, I, E) of a SplitMap that does the same at each of E
    coordinates.
    """
    return torch.tensor(rows, dtype=torch.float64)[:, :, None].repeat(1, 1, width)


def repeat_each(parts: int, times: int, width: int) -> Tensor:
    """SplitMap weight, parts -> parts * times: part i goes to heads i * times, ..., i * times +
    times - 1.
    """
    return pattern(
        [[float(i == j) for j in range(parts)] for i in range(parts) for _ in range(times)], width
    )


def repeat_all(parts: int, times: int, width: int) -> Tensor:
    """SplitMap weight, parts -> times * parts: the parts in order, `times` times."""
    return pattern(
        [[float(i == j) for j in range(parts)] for _ in range(times) for i in range(parts)], width
    )


def mirrored(weight: Tensor) -> Tensor:
    """SplitMap weight of the transposed map: sums what the map spreads."""
    return weight.transpose(0, 1).contiguous()


def same(width: int) -> Tensor:
    """SplitMap weight, one part as wide as the whole range: moves nothing."""
    return pattern([[1.0]], width)


def one_hots(parts: int, width: int) -> Tensor:
    """SplitMap weight, 1 -> parts: part s keeps coordinate s only."""
    return torch.eye(parts, width, dtype=torch.float64)[:, None]


class SplitMap(nn.Module):
    """H_sim-split linear map over parts of equal width: y_a = sum_i w_ai * x_i, coordinate by
    coordinate.

    (..., I, E) -> (..., A, E) with A * I * E parameters; a dense map would have A * I * E^2. It is
    the head-mixing factor of the paper's split maps: because pages are laid out in whole heads,
    nothing ever moves within a head. The input may be cut into other parts of the same total, as a
    whole range is for a map that moves nothing. Source: TINT.md section 3, "Linear forward"; paper
    section 2.3.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        x = regroup(x, weight.shape[1])
        y = weight[:, 0] * x[..., :1, :]
        for i in range(
            1, weight.shape[1]
        ):  # on a CPU 15 to 40 times faster than one product of E small matrices
            y = torch.addcmul(y, weight[:, i], x[..., i : i + 1, :])
        return y

    def whole(self, x: Tensor) -> Tensor:
        """(..., I * E) -> (..., A * E): parts side by side."""
        y: Tensor = self(x.unsqueeze(-2)).flatten(-2)
        return y


class LinearAttention(nn.Module):
    """Attention without softmax: o_t = O sum_j <Q x_t, K y_j> V z_j, head by head; y and z are two
    views of the same tokens.
    """

    def __init__(
        self, heads: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (
            SplitMap(query),
            SplitMap(key),
            SplitMap(value),
            SplitMap(output),
        )

    def forward(self, asking: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(..., T, parts, E) for asking, (..., J, parts, E) for keys and values -> (..., T, parts,
        E).
        """
        mapped = self.query(asking), self.key(keys), self.value(values)
        q_ATE, k_AJE, v_AJE = (regroup(x, self.heads).transpose(-3, -2) for x in mapped)
        o_ATE = torch.matmul(torch.matmul(q_ATE, k_AJE.mT), v_AJE)
        o: Tensor = self.output(o_ATE.transpose(-3, -2))
        return o


class NarrowAttention(nn.Module):
    """Linear attention whose heads are one coordinate wide: o_tc = O_c (Q_c x_tc) sum_j (K_c y_jc)
    (V_c z_jc).

    It is what multiplies coordinates: a gain with what it scales (J = the one prefix token that
    holds it), or, when `itself`, two activations of one token, which then attends to itself alone.
    W heads; the four maps have W parameters each.
    pieces, once: of what `once` names (query, key, value, output) a token holds one piece of W /
    pieces coordinates, which serves all of them: maps of what is read spread it, that of the output
    sums the pieces.
    """

    def __init__(
        self, width: int, *, pieces: int = 1, once: tuple[str, ...] = (), itself: bool = False
    ) -> None:
        super().__init__()
        weights = {
            name: repeat_all(1, pieces, width // pieces) if name in once else same(width)
            for name in _MAPS
        }
        self.query, self.key, self.value = (SplitMap(weights[name]) for name in _MAPS[:3])
        self.output = SplitMap(mirrored(weights["output"]))
        self.itself = itself

    def forward(self, asking: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(..., T, W) and (..., J, W) -> (..., T, W)."""
        q, k, v = self.query.whole(asking), self.key.whole(keys), self.value.whole(values)
        return self.output.whole(q * (k * v if self.itself else (k * v).sum(-2, keepdim=True)))


class SelfAttention(nn.Module):
    """Linear attention of a token to itself alone, one head for each piece, E = W / pieces wide: o
    = O (<Q x, K y> / E) V z.
    """

    def __init__(self, width: int, pieces: int = 1) -> None:
        super().__init__()
        self.pieces = pieces
        self.query, self.key, self.value, self.output = (SplitMap(same(width)) for _ in range(4))

    def forward(self, asking: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(..., T, W) each -> (..., T, W)."""
        mapped = self.query.whole(asking), self.key.whole(keys), self.value.whole(values)
        q, k, v = (torch.unflatten(x, -1, (self.pieces, -1)) for x in mapped)
        return self.output.whole(((q * k).mean(-1, keepdim=True) * v).flatten(-2))


class Gate(nn.Module):
    """keep, take = tanh(G code): how much of a coordinate a token keeps and how much of a module's
    result it takes.

    A linear map of the position code alone, so prefix and input tokens are gated separately; 2 * 2
    d parameters. A module evaluates it for the side that it writes: tokens of the other keep all
    and take nothing. Source: TINT.md section 3, "Gates".
    """

    def __init__(
        self, width: int, *, prefix: tuple[float, float], inputs: tuple[float, float]
    ) -> None:
        super().__init__()
        weight = torch.zeros(2, 2 * width, dtype=torch.float64)
        weight[:, width] = _OPEN * torch.tensor(inputs)  # every token has a one there
        weight[:, :width] = _OPEN * (torch.tensor(prefix) - torch.tensor(inputs))[:, None]
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2 d) -> two of (..., 1)."""
        open_2 = torch.tanh(F.linear(code, self.weight.to(code.dtype)))
        return open_2[..., :1], open_2[..., 1:]


class Counted(nn.Module):
    """What all modules share. width: d, coordinates of a head.

    formula, sizes: how many parameters the module has, as an expression in named sizes.
    """

    formula = "0"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes, self.width = {"d": width}, width


class Layer(Counted):
    """What all modules share that write: a gate and the write to the residual stream or page.

    forward(stream (B, T, C), code, ...) -> stream, with one range rewritten; on the prefix side
    (descents) forward(page (K, D_sim) or (B, K, D_sim), code, stream, ...) -> page (B, K, D_sim).
    Sums over tokens are sums, not means.
    add: the result is added to what the coordinates hold; else it replaces that.
    """

    formula = "4*d"

    def __init__(self, width: int, *, add: bool = False, side: str = "inputs") -> None:
        super().__init__(width)
        written, other = (float(add), 1.0), (1.0, 0.0)
        self.gate = Gate(
            width,
            prefix=written if side == "prefix" else other,
            inputs=written if side == "inputs" else other,
        )

    def ones(self, code: Tensor) -> Tensor:
        """(1, 1, d): the ones of the input tokens' position code."""
        return code[-1:, None, self.width :]

    def places(self, code: Tensor, place: Place) -> Tensor:
        """(tokens, 1, d): the one-hots of the prefix tokens of `place`."""
        return code[place.first : place.last, None, : self.width]

    def write(self, stream: Tensor, code: Tensor, where: Range, value: Tensor) -> Tensor:
        """The stream with keep * old + write * value in a range of its coordinates; in place unless
        torch records.
        """
        keep, take = self.gate(code[-1])
        new = gated(keep, read(stream, where)) + take * value
        if torch.is_grad_enabled() and (stream.requires_grad or new.requires_grad):
            stream = stream.clone()
        stream[:, : where.tokens, where.start : where.stop] = new
        return stream

    def update(self, page: Tensor, code: Tensor, place: Place, value: Tensor) -> Tensor:
        """A new page, one a sequence, with keep * old + write * value at a place of it."""
        keep, take = self.gate(code[place.first : place.last])
        new = page.expand(*value.shape[:-2], *page.shape[-2:]).clone()
        new[..., place.first : place.last, place.start : place.stop] = (
            gated(keep, held(page, place)) + take * value
        )
        return new


def gated(keep: Tensor, old: Tensor) -> Tensor:
    """keep * old, and 0 where nothing is kept: what overflowed in coordinates that are used again
    must not live on as NaN.
    """
    return torch.where(keep == 0, 0, keep * old)


def stepped(x: Tensor, rate: Tensor) -> Tensor:
    """-rate * x, (B, ...): of one rate for all sequences, or one each."""
    return x * -along(rate, x, x.ndim - 1)


def held(page: Tensor, place: Place) -> Tensor:
    """(..., tokens, W): what a page holds at a place."""
    return page[..., place.first : place.last, place.start : place.stop]
