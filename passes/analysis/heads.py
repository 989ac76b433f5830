"""Heads of an attention's operand: which coordinates of which activation they are, and how
positions turn them.

a query, key or value, in any layout  ->  Heads: root, rows, heads x width, factor, rotation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tintc.ir.builder import input_node
from tintc.ir.context import Context
from tintc.ir.layout import Rows
from tintc.passes.analysis.coordinates import BATCH, LENGTH, Term, Untraceable, trace
from tintc.passes.analysis.evaluation import SHORT, Evaluation, evaluable, lengths_below
from tintc.passes.analysis.patterns import sizes


class OfLength(Untraceable):
    """A rotation that is another one for calls of another length, up to the longest there is."""

    def __init__(self, reason: str, longest: int) -> None:
        super().__init__(reason)
        self.longest = longest


@dataclass(frozen=True)
class Entry:
    """coefficient * product of table entries, one for each of some coordinates of a head: factors
    are (node, for each axis of its value the coordinate of each entry, or None for the axis that
    counts tokens)."""

    coefficient: Tensor
    factors: tuple[tuple[fx.Node, tuple[Tensor | None, ...]], ...]

    def key(self) -> tuple[Any, ...]:
        """Equal for equal entries."""
        places = [
            (node, *(None if place is None else tuple(place.tolist()) for place in axes))
            for node, axes in self.factors
        ]
        return (tuple(self.coefficient.tolist()), *places)


@dataclass(frozen=True)
class Rotation:
    """The first `size` coordinates turn; cos and sin are sums of entries, 0 where an entry has
    coefficient 0.
    """

    pairing: str
    size: int
    cos: tuple[Entry, ...]
    sin: tuple[Entry, ...]

    def key(self) -> tuple[Any, ...]:
        """Equal for rotations with equal tables."""
        return tuple(tuple(entry.key() for entry in entries) for entries in (self.cos, self.sin))

    def tables(self, length: int, context: Context) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 .. length - 1, or of as many as the model's own tables have,
        each (positions, size).
        """
        nodes = [node for entry in (*self.cos, *self.sin) for node, _ in entry.factors]
        values = evaluable(nodes, length, context)
        cos, sin = table_of(self.cos, values), table_of(self.sin, values)
        few = Evaluation(2, min(SHORT, values.length), context)
        for node in nodes:
            has_batch = str(node.meta["val"].shape[0]) == str(
                input_node(node.graph, "input_ids").meta["val"].shape[0]
            )
            if has_batch and not torch.equal(*few.of(node)):
                raise Untraceable("its rotation differs between sequences")
        for length in lengths_below(values.length):
            few = Evaluation(1, length, context)
            for entries, table in ((self.cos, cos), (self.sin, sin)):
                if not torch.allclose(table_of(entries, few), table[:length], rtol=1e-5, atol=1e-6):
                    raise OfLength(
                        f"its rotation depends on the length of the sequence: {length} and "
                        f"{values.length} tokens have different ones",
                        values.length,
                    )
        return cos, sin


@dataclass(frozen=True)
class Heads:
    """factor * rotated(root[rows]), seen as `groups` heads of `width` coordinates; queries read
    head h of groups h // (heads / groups).
    """

    root: fx.Node
    rows: Rows
    heads: int
    groups: int
    width: int
    factor: float
    rotation: Rotation | None


def read_heads(node: fx.Node, context: Context, *, axes: str = "htw") -> Heads:
    """The heads of an operand. axes: the order of heads, tokens and width behind the batch, which
    may be merged with the heads.

    Raises Untraceable, with the reason, if the operand is anything else.
    """
    found = trace(node, context)
    terms = [_by_head(term, axes) for term in found.terms]
    root_width = int(sizes(found.root)[-1])
    own = [_own_token(term, root_width) for term in terms]
    rows, main = _rows(torch.stack([index for _, index in own]), root_width)
    is_main = [(index == main) & (index >= 0) for _, index in own]
    partner = _partner(own, is_main)
    groups = len(set(main[:, 0].tolist()))
    width = main.shape[1]
    if partner is None:
        return Heads(
            found.root,
            rows,
            len(main),
            groups,
            width,
            _constant(terms, is_main, range(width)),
            None,
        )
    size, pairing = _pairing(main, partner)
    factor = _constant(terms, is_main, range(size, width)) if size < width else 1.0
    is_partner = [(index >= 0) & ~mine for (_, index), mine in zip(own, is_main, strict=True)]
    cos, sin = (
        tuple(_entry(t, mask, size, factor) for t, mask in zip(terms, masks, strict=True))
        for masks in (is_main, is_partner)
    )
    return Heads(
        found.root, rows, len(main), groups, width, factor, Rotation(pairing, size, cos, sin)
    )


def _by_head(term: Term, axes: str) -> Term:
    """The term as (batch, heads, tokens, width)."""

    def arrange(x: Tensor) -> Tensor:
        if x.ndim not in ((4,) if axes == "thw" else (3, 4)):
            raise Untraceable(f"it has {x.ndim} axes; expected batch, heads, tokens and width")
        x = x.mT if axes == "hwt" else x.transpose(1, 2) if axes == "thw" else x
        if x.shape[-2] != LENGTH:
            raise Untraceable("its tokens are not where they are in (batch, heads, tokens, width)")
        return x.reshape(BATCH, -1, LENGTH, x.shape[-1])

    return term.map(arrange)


def _own_token(term: Term, width: int) -> tuple[Tensor, Tensor]:
    """(coefficient, coordinate of the root or -1), each (heads, width), after checking that no
    element leaves its sequence and token.
    """
    index = torch.where(term.coefficient != 0, term.index, -1)
    batch, token = (
        torch.arange(BATCH)[:, None, None, None],
        torch.arange(LENGTH)[None, None, :, None],
    )
    home = (batch * LENGTH + token) * width
    if bool(((index >= 0) & ((index < home) | (index >= home + width))).any()):
        raise Untraceable(
            "it mixes tokens or sequences (its heads are not split as batch, tokens, heads, width)"
        )
    coordinate = torch.where(index >= 0, index - home, -1)
    for value in (coordinate, term.coefficient):
        if not bool((value == value[:1, :, :1]).all()):
            raise Untraceable("its coordinates depend on the token")
    return term.coefficient[0, :, 0], coordinate[0, :, 0]


def _rows(indices: Tensor, width: int) -> tuple[Rows, Tensor]:
    """(rows of the root, (heads, width): the coordinate that belongs to each place of a head)."""
    heads, each = indices.shape[1:]
    used: Tensor = torch.unique(indices[indices >= 0])
    if used.numel() == 0 or used.numel() % each or heads % (used.numel() // each):
        raise Untraceable(f"it reads {used.numel()} coordinates for {heads} heads of {each}")
    groups = used.numel() // each
    main = used.view(groups, each).repeat_interleave(heads // groups, 0)
    return rows_of(used, width), main


def rows_of(used: Tensor, width: int) -> Rows:
    """Ascending coordinates as rows that repeat. Raises Untraceable if they do not."""
    breaks = (used.diff() != 1).nonzero()[:, 0]
    start, size = int(used[0]), int(breaks[0]) + 1 if breaks.numel() else used.numel()
    period = int(used[size]) - start if breaks.numel() else width
    all_rows = torch.arange(width)
    expected = all_rows[(all_rows % period >= start) & (all_rows % period < start + size)]
    if width % period or start + size > period or not torch.equal(expected, used):
        raise Untraceable(
            f"it reads coordinates {used.tolist()[:6]}... of {width}; expected a range that repeats"
        )
    return Rows(start, start + size, period)


def _partner(own: list[tuple[Tensor, Tensor]], is_main: list[Tensor]) -> Tensor | None:
    """(heads, width): the second coordinate that each place reads, or -1; None if there is none at
    all.
    """
    others = torch.stack(
        [torch.where(mine, -1, index) for (_, index), mine in zip(own, is_main, strict=True)]
    )
    partner: Tensor = others.amax(0)
    if not bool(((others == partner) | (others < 0)).all()):
        raise Untraceable("a coordinate is made of more than two others")
    return partner if bool((partner >= 0).any()) else None


def _pairing(main: Tensor, partner: Tensor) -> tuple[int, str]:
    """(coordinates that turn, how they are paired)."""
    size = int((partner[0] >= 0).sum())
    places = (
        (main[:, None, :] == partner[:, :size, None]).long().argmax(-1)
    )  # where in the head the partner stands
    if not bool((partner[:, :size] >= 0).all() & (partner[:, size:] < 0).all()) or size % 2:
        raise Untraceable(
            "its heads are in another order, or other coordinates than the first of each are "
            "rotated"
        )
    if bool((places == (torch.arange(size) + size // 2) % size).all()):
        return size, "half"
    if bool((places == torch.arange(size) ^ 1).all()):
        return size, "interleaved"
    raise Untraceable("it rotates other pairs than halves or neighbours")


def _constant(terms: list[Term], is_main: list[Tensor], places: range) -> float:
    """The one number that these places of all heads are multiplied by."""
    total = torch.zeros(is_main[0].shape, dtype=torch.float64)
    for term, mine in zip(terms, is_main, strict=True):
        if any(_inside(index, mine, places) for _, index in term.factors):
            raise Untraceable("positions scale it without rotating it")
        total += torch.where(mine, term.coefficient[0, :, 0], 0)
    wanted = total[:, places.start : places.stop]
    if not bool((wanted == wanted.flatten()[0]).all()):
        raise Untraceable("its coordinates are scaled by different numbers")
    return float(wanted.flatten()[0])


def _inside(index: Tensor, mine: Tensor, places: range) -> bool:
    part = slice(places.start, places.stop)
    return bool(((index[0, :, 0] >= 0) & mine)[:, part].any())


def _entry(term: Term, mask: Tensor, size: int, factor: float) -> Entry:
    """A term's part in a table, for the first `size` places of a head, after checking that all
    heads agree.
    """
    coefficient = torch.where(mask, term.coefficient[0, :, 0], 0.0)[:, :size] / factor
    used = coefficient != 0
    factors = []
    for node, index in term.factors:
        places = index[0, :, 0, :size]
        if not bool((used == used[:1]).all()) or not bool(((places == places[:1]) | ~used).all()):
            raise Untraceable("its heads rotate differently")
        factors.append((node, _axes(node, index[:1, :1, :, :size], used[0])))
    if not bool((coefficient == coefficient[:1]).all()):
        raise Untraceable("its heads rotate differently")
    return Entry(coefficient[0], tuple(factors))


def _axes(node: fx.Node, index: Tensor, used: Tensor) -> tuple[Tensor | None, ...]:
    """For each axis of the table's value the coordinate of each place, None for the axis along
    which token t reads entry t.
    """
    value = node.meta["val"]
    tokens = input_node(node.graph, "input_ids").meta["val"]
    known = {str(tokens.shape[0]): BATCH, str(tokens.shape[1]): LENGTH}
    shape = [size if isinstance(size, int) else known[str(size)] for size in value.shape] + [
        2
    ] * value.is_complex()
    places = torch.unravel_index(index.clamp(min=0), shape)
    token = torch.arange(LENGTH)[None, None, :, None]
    found: list[Tensor | None] = []
    for place in places:
        counts_tokens = (
            None not in found and bool(((place == token) | ~used).all()) and LENGTH in shape
        )
        if counts_tokens and shape[len(found)] == LENGTH:
            found.append(None)
        else:
            found.append(place[0, 0, 0])
    if None in found and value.ndim:
        return tuple(found)
    raise Untraceable("it is multiplied by something that is no table of positions")


def _real(value: Tensor) -> Tensor:
    """A table as its factors count it: with an axis more for real and imaginary part if it is
    complex.
    """
    return torch.view_as_real(value) if value.is_complex() else value


def table_of(entries: tuple[Entry, ...], values: Evaluation) -> Tensor:
    """(positions, size): the sum of the entries."""
    total: Tensor | None = None
    for entry in entries:
        part = entry.coefficient.expand(values.length, -1)
        for node, axes in entry.factors:
            value = _real(values.of(node)).double()
            axis = axes.index(None)
            where: tuple[Any, ...] = (slice(None), *(place for place in axes if place is not None))
            part = part * torch.where(entry.coefficient != 0, value.movedim(axis, 0)[where], 0)
        total = part if total is None else total + part
    assert total is not None
    return total


def read_columns(node: fx.Node, context: Context) -> tuple[fx.Node, Rows]:
    """(activation, its coordinates) of a (batch, tokens, width) part of it. Raises Untraceable if
    the node is anything else.
    """
    found = trace(node, context)
    if any(term.index.shape[:2] != (BATCH, LENGTH) or term.index.ndim != 3 for term in found.terms):
        raise Untraceable("it is not laid out as batch, tokens, width")
    terms = [term.map(lambda x: x.unsqueeze(1)) for term in found.terms]
    width = int(sizes(found.root)[-1])
    own = [_own_token(term, width) for term in terms]
    if (
        len(own) != 1
        or terms[0].factors
        or not bool((own[0][0] == 1).all() & (own[0][1] >= 0).all())
    ):
        raise Untraceable("it computes with its coordinates")
    used = own[0][1][0]
    if not bool((used.diff() > 0).all()):
        raise Untraceable("its coordinates are not in order")
    return found.root, rows_of(used, width)
