"""Rotary tables whose frequencies depend on how many positions a call has.

cos, sin (positions, R), others for every length  ->  a cos(p f(length)), a sin(p f(length))

The captured graph computes f from one number, the greatest position plus one. That number is set to
every length there may be, at a sequence of two tokens: at position 1 an angle is its frequency.
Which angle a coordinate of the table is of, and by what it is multiplied, is asked of the graph
behind the cosines, with 0 and 1 in their place. The tables that come of it are then compared with
those that the graph has itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from tintc.ir.builder import ancestors
from tintc.ir.context import Context
from tintc.ir.ops.position import WAVES
from tintc.passes.analysis.coordinates import Untraceable
from tintc.passes.analysis.evaluation import (
    SIZE_ONLY,
    Evaluation,
    evaluated_length,
    is_positional,
    lengths_below,
)
from tintc.passes.analysis.heads import Entry, Rotation, table_of
from tintc.passes.analysis.patterns import aten, calls

_TRIED = (2, 5, 11)  # lengths at which a number is seen to be the length


class Rows(NamedTuple):
    """A row for each length: row i is of length first + i, the first also of all that are shorter,
    the last of all that are longer.
    """

    table: Tensor  # (N, R)
    first: int


class Wave(NamedTuple):
    """amplitude * function(position * frequency), both of the call's length."""

    function: str
    frequency: Rows
    amplitude: Rows


def waves_of(rotation: Rotation, longest: int, context: Context) -> tuple[Wave, Wave]:
    """cos and sin of a rotation for lengths up to `longest`. Raises Untraceable for any other
    dependence on the length.
    """
    try:
        return _read(rotation.cos, longest, context), _read(rotation.sin, longest, context)
    except (RuntimeError, TypeError, IndexError) as error:
        raise Untraceable(
            "its rotation depends on the length of the sequence, and its frequencies cannot be "
            f"read ({str(error).splitlines()[0][:100]})"
        ) from None


def _read(entries: tuple[Entry, ...], longest: int, context: Context) -> Wave:
    graph = _Graph(entries, context)
    found = graph.wave(torch.arange(1, longest + 1))
    for length in (*lengths_below(longest), longest):
        expected = table_of(entries, Evaluation(1, length, context))
        computed = _computed(found, length)
        if not torch.allclose(computed, expected, rtol=1e-5, atol=graph.rounding):
            raise Untraceable(
                f"its rotation depends on the length of the sequence: at {length} tokens it is "
                "not position times frequency"
            )
    return found


class _Graph:
    """What computes one table."""

    def __init__(self, entries: tuple[Entry, ...], context: Context) -> None:
        self.entries, self.context = entries, context
        nodes = [node for entry in entries for node, _ in entry.factors]
        before = [n for n in ancestors(nodes) if n.op == "call_function"]
        self.waves = [n for n in before if calls(n, aten.cos, aten.sin, aten.polar)]
        self.angles: list[Any] = [n.args[1 if calls(n, aten.polar) else 0] for n in self.waves]
        self.lengths = [n for n in before if _is_length(n, context)]
        if not self.waves or not self.lengths:
            raise Untraceable(
                "its rotation depends on the length of the sequence by something else than "
                "frequencies of the greatest position"
            )
        types = [node.meta["val"].dtype for node in nodes]
        inexact = [kind for kind in types if kind.is_floating_point or kind.is_complex]
        rounding = (4 * torch.finfo(kind).eps for kind in inexact)
        self.rounding = max([1e-6, *rounding])  # of the model's own table
        self.function = self._function()

    def wave(self, lengths: Tensor) -> Wave:
        """At each of the lengths 1, 2, ..."""
        index = self._index()
        angles, amplitude = torch.vmap(self._at)(lengths)
        frequency = _rows(torch.cat([angle.flatten(1) for angle in angles], 1)[:, index])
        # Many at a time may round otherwise than one, and positions multiply that.
        each = range(frequency.first, frequency.first + len(frequency.table))
        table = torch.stack([self._frequency(n)[index] for n in each])
        return Wave(self.function, Rows(table, frequency.first), _rows(amplitude))

    def _frequency(self, length: int) -> Tensor:
        """All angles at the first two tokens, side by side."""
        angles = self._values(torch.tensor(length)).of(self.angles)
        return torch.cat([angle.flatten() for angle in angles])

    def _at(self, length: Tensor) -> tuple[list[Tensor], Tensor]:
        """(angles of the first two tokens, amplitudes) in a call of that length."""
        angles = self._values(length).of(self.angles)
        ones = [torch.ones_like(angle) for angle in angles]
        return angles, self._table(length, self.function, ones)

    def _values(self, length: Tensor) -> Evaluation:
        values = Evaluation(1, 2, self.context)
        for node in self.lengths:
            known = node.meta["val"]
            values.put(node, length.reshape(known.shape).to(known.dtype))
        return values

    def _table(self, length: Tensor, function: str, numbers: list[Tensor]) -> Tensor:
        """(R,) the table at position 1 with these numbers in place of one function of the angles,
        and 0 in place of the other.
        """
        values = self._values(length)
        for wave, number in zip(self.waves, numbers, strict=True):
            none = torch.zeros_like(number)
            if calls(wave, aten.polar):
                parts = (number, none) if function == "cos" else (none, number)
                values.put(wave, torch.complex(*parts))
            else:
                own = calls(wave, aten.cos if function == "cos" else aten.sin)
                values.put(wave, number if own else none)
        return table_of(self.entries, values)[1]

    def _function(self) -> str:
        """The one that all of the table is made of."""
        two = torch.tensor(2)
        ones = [torch.ones_like(angle) for angle in self._values(two).of(self.angles)]
        whole = [f for f in WAVES if bool((self._table(two, f, ones) != 0).all())]
        part = [f for f in WAVES if bool((self._table(two, f, ones) != 0).any())]
        if len(whole) != 1 or part != whole:
            raise Untraceable(
                "its rotation depends on the length of the sequence, and one of its tables is "
                "neither of cosines nor of sines"
            )
        return whole[0]

    def _index(self) -> Tensor:
        """(R,) which number of all angles, side by side, each coordinate at position 1 is of: digit
        by digit, since a model may round them to few.
        """
        two = torch.tensor(2)
        angles = self._values(two).of(self.angles)
        sizes = [angle.numel() for angle in angles]
        found = torch.tensor(0)
        for digit in range(sum(sizes).bit_length()):
            bits = torch.split((torch.arange(sum(sizes)) >> digit) & 1, sizes)
            numbers = [b.view(a.shape).to(a.dtype) for b, a in zip(bits, angles, strict=True)]
            found = found + ((self._table(two, self.function, numbers) != 0).long() << digit)
        return found


def _is_length(node: fx.Node, context: Context) -> bool:
    """Whether it is one whole number, which is the length of the sequence."""
    found = node.meta.get("val")
    if not isinstance(found, Tensor) or found.dtype != torch.int64:
        return False
    if any(not isinstance(size, int) or size != 1 for size in found.shape):
        return False
    return is_positional(node) and all(int(Evaluation(1, n, context).of(node)) == n for n in _TRIED)


def other_by_length(nodes: Sequence[fx.Node], context: Context) -> dict[fx.Node, str]:
    """Why no island may read a value: of those among the nodes, in order, that follow from the
    greatest position alone, and have other first rows in a call of another length. They may change
    far behind the lengths at which an island is looked at.
    """
    behind: set[fx.Node] = set()
    for node in nodes:
        reads = () if calls(node, *SIZE_ONLY) else node.all_input_nodes
        if any(n in behind for n in reads) or _is_length(node, context):
            behind.add(node)
    read = [
        node
        for node in nodes
        if node in behind
        and is_positional(node)
        and isinstance(node.meta.get("val"), Tensor)
        and not all(is_positional(user) for user in node.users)
    ]
    found: dict[fx.Node, str] = {}
    longest = evaluated_length(context)
    whole = Evaluation(1, longest, context)
    for length in lengths_below(longest) if read else ():
        few = Evaluation(1, length, context)
        for node in [n for n in read if n not in found]:
            value = few.of(node)
            first = whole.of(node)[tuple(slice(0, size) for size in value.shape)]
            if not torch.allclose(value, first, rtol=1e-5, atol=1e-6):
                found[node] = (
                    f"it depends on the length of the sequence: what it reads of positions is "
                    f"another with {length} tokens than with {longest}"
                )
    return found


def _rows(values_LR: Tensor) -> Rows:
    """Of lengths 1, 2, ..., without what only repeats."""
    same = (values_LR[1:] == values_LR[:-1]).all(-1)
    changes = (~same).nonzero()[:, 0].tolist()
    if not changes:
        return Rows(values_LR[:1], 1)
    return Rows(values_LR[changes[0] : changes[-1] + 2], changes[0] + 1)


def _computed(found: Wave, length: int) -> Tensor:
    """The table of a call of that length."""
    frequency, amplitude = (_row(rows, length) for rows in (found.frequency, found.amplitude))
    angle = torch.arange(length, dtype=frequency.dtype)[:, None] * frequency
    turned: Tensor = getattr(angle, found.function)()
    return amplitude * turned.double()


def _row(rows: Rows, length: int) -> Tensor:
    return rows.table[min(max(length - rows.first, 0), len(rows.table) - 1)]
