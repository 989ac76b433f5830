"""Slots of random models: a simulation of the prefix tokens shows that every number has a place of
its own.
"""

import json
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from tests.support.stages import apply, before
from tintc.ir.builder import Builder
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.errors import UsageError
from tintc.ir.layout import Layout, PrefixSlot, Range, Rows
from tintc.ir.node_meta import NodeInfo
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.ops.norm import norm_forward
from tintc.passes.place.assign_prefix_slots import assign_prefix_slots

Shapes = list[tuple[int, int, bool]]  # outputs, inputs, bias


def a_graph(hidden: int, linears: Shapes, norms: int) -> tuple[fx.Graph, Context]:
    """Layers side by side, each on an input of its own; the slot pass asks for no more."""
    graph, build = fx.Graph(), None
    context = Context(SimulatorConfig())
    context.learn(hidden=hidden)
    build = Builder(graph)

    def parameter(name: str, *shape: int) -> fx.Node:
        node = build.placeholder(name, shape, role="parameter")
        node.meta["tint"] = NodeInfo(shape=shape, role="parameter", parameter=name)
        return build.call(prefix, node, 0, shape[0], shape[0], False, slot=name, trainable=True)

    last = None
    for i, (rows, columns, has_bias) in enumerate(linears):
        x = build.placeholder(f"x{i}", ("B", "T", columns), role="input")
        bias = parameter(f"b{i}", rows) if has_bias else None
        last = build.call(linear_forward, x, parameter(f"w{i}", rows, columns), bias)
    for i in range(norms):
        x = build.placeholder(f"n{i}", ("B", "T", hidden), role="input")
        last = build.call(
            norm_forward,
            x,
            parameter(f"gamma{i}", hidden),
            parameter(f"beta{i}", hidden),
            1e-5,
            "layer",
            1,
            0.0,
        )
    graph.output(last)
    return graph, context


def solve(hidden: int, linears: Shapes, norms: int, **fields: Any) -> Layout:
    graph, context = a_graph(hidden, linears, norms)
    context.config = SimulatorConfig(**fields)
    assign_prefix_slots(graph, context)
    assert context.layout is not None
    return context.layout


def write_and_read(layout: Layout) -> None:
    """Writes every slot's numbers, each of its own value, into empty prefix tokens, and reads all
    of them back.
    """
    tokens = torch.zeros(layout.pages, layout.prefix_tokens, layout.sim_hidden, dtype=torch.int64)
    count = 1
    values = {}
    for slot in layout.prefix.values():
        values[slot.name] = torch.arange(count, count + slot.numbers).reshape(
            slot.shape if len(slot.shape) == 2 else (*slot.shape, 1)
        )
        count += slot.numbers
        for where, row, column in places(slot):
            assert int(tokens[where]) == 0, f"{slot.name} overwrites another number"
            tokens[where] = values[slot.name][row, column]
    for slot in layout.prefix.values():
        found = torch.zeros_like(values[slot.name])
        for where, row, column in places(slot):
            found[row, column] = tokens[where]
        assert torch.equal(found, values[slot.name]), f"{slot.name} is not covered"


def places(slot: PrefixSlot) -> list[tuple[tuple[int, int, int], int, int]]:
    """((page, token, coordinate), row, column) of each number: rows dealt out to the tile's tokens
    like cards.
    """
    found = []
    for tile in slot.tiles:
        for i in range(tile.rows.size):
            s, token = divmod(i, tile.tokens.size)
            for j in range(tile.columns.size):
                where = (
                    tile.page,
                    tile.tokens.start + token,
                    tile.coordinates.start + s * tile.row_width + j,
                )
                assert where[1] < tile.tokens.stop
                assert where[2] < tile.coordinates.stop
                found.append((where, tile.rows.start + i, tile.columns.start + j))
    return found


shapes = st.lists(
    st.tuples(st.integers(1, 23), st.integers(1, 23), st.booleans()), min_size=1, max_size=5
)


@given(st.integers(1, 17), shapes, st.integers(0, 5))
@settings(max_examples=60)
def test_every_number_has_a_place_of_its_own(hidden: int, linears: Shapes, norms: int) -> None:
    layout = solve(hidden, linears, norms)
    write_and_read(layout)
    check_shape(layout, hidden if norms else 1)
    assert set(layout.prefix) == {
        *(f"w{i}" for i in range(len(linears))),
        *(f"b{i}" for i, s in enumerate(linears) if s[2]),
    } | {f"{name}{i}" for i in range(norms) for name in ("gamma", "beta")}


def check_shape(layout: Layout, widest_vector: int) -> None:
    """What the modules rely on: whole heads, a head left for biases, and a one-hot of the prefix
    tokens in every head.
    """
    d = layout.head_width
    assert layout.sim_hidden == layout.sim_heads * d
    assert layout.sim_heads >= 2
    assert layout.prefix_tokens <= d
    assert layout.sim_hidden >= widest_vector
    for name, slot in layout.prefix.items():
        for tile in slot.tiles:
            assert tile.coordinates.size == tile.groups * tile.row_width
            assert (
                (tile.groups - 1) * tile.tokens.size
                < tile.rows.size
                <= tile.groups * tile.tokens.size
            )
            if len(slot.shape) == 2:
                assert tile.row_width % d == 0
                assert tile.coordinates.start % d == 0
                assert tile.tokens.start == 0
                assert tile.coordinates.stop <= layout.sim_hidden - d, (
                    f"{name} leaves no head for biases"
                )
            else:
                assert tile.row_width == 1
    for name, bias in layout.prefix.items():
        if name.startswith("b") and name[1:].isdigit():
            weights = {
                (t.page, t.rows, t.tokens)
                for t in layout.prefix[f"w{name[1:]}"].tiles
                if t.columns.start == 0
            }
            assert {(t.page, t.rows, t.tokens) for t in bias.tiles} == weights, (
                "biases stand with their rows"
            )


@given(st.integers(1, 9), shapes, st.integers(0, 3), st.integers(2, 8), st.data())
@settings(max_examples=60)
def test_given_sizes_are_kept(
    hidden: int, linears: Shapes, norms: int, heads: int, data: st.DataObject
) -> None:
    """Any two heads or more, any D_sim that holds a vector, any K up to a head's width: larger
    matrices take more pages.
    """
    width = data.draw(st.integers(math.ceil(hidden / heads), math.ceil(hidden / heads) + 12))
    tokens = data.draw(st.integers(1, width))
    layout = solve(
        hidden, linears, norms, prefix_tokens=tokens, sim_hidden=heads * width, sim_heads=heads
    )
    assert (layout.prefix_tokens, layout.sim_hidden, layout.sim_heads) == (
        tokens,
        heads * width,
        heads,
    )
    write_and_read(layout)
    check_shape(layout, hidden if norms else 1)


sizes = st.fixed_dictionaries(
    {},
    optional={
        "prefix_tokens": st.integers(1, 20),
        "sim_hidden": st.integers(1, 40),
        "sim_heads": st.integers(1, 12),
    },
)


@given(st.integers(1, 9), shapes, st.integers(0, 3), sizes)
@settings(max_examples=100)
def test_following_the_advice_leads_to_sizes_that_work(
    hidden: int, linears: Shapes, norms: int, fields: dict[str, int]
) -> None:
    """Whatever sizes are given work, or are refused with one change after which they do."""
    wanted = dict(fields)
    try:
        layout = solve(hidden, linears, norms, **wanted)
    except UsageError as refusal:
        message = str(refusal)
        found = re.match(r"(\w+) is (\d+); .*[Tt]he nearest that works is (\w+ )?(\d+)$", message)
        assert found is not None and wanted[found[1]] == int(found[2]), message
        wanted = {found[1]: 0} if "Leave the other sizes" in message else wanted
        wanted[(found[3] or found[1]).strip()] = int(found[4])
        layout = solve(hidden, linears, norms, **wanted)
    assert {name: getattr(layout, name) for name in wanted} == wanted
    write_and_read(layout)


def test_a_linear_layer_is_dealt_out_to_tokens() -> None:
    """K = 4, 10 rows of 6: S = 3 rows a token in a head each, then a head with the biases of these
    rows.
    """
    layout = solve(6, [(10, 6, True)], 0, prefix_tokens=4, sim_hidden=24, sim_heads=4)
    (weight,), (bias,) = layout.prefix["w0"].tiles, layout.prefix["b0"].tiles
    assert (weight.groups, weight.row_width, weight.tokens, weight.coordinates) == (
        3,
        6,
        Range(0, 4),
        Range(0, 18),
    )
    assert (bias.page, bias.groups, bias.row_width, bias.tokens) == (
        weight.page,
        3,
        1,
        weight.tokens,
    )
    assert bias.coordinates == Range(18, 21)
    assert layout.pages == 1
    by_number = {row: where for where, row, column in places(layout.prefix["w0"]) if column == 0}
    assert [by_number[row] for row in (0, 1, 3, 4, 9)] == [
        (0, 0, 0),
        (0, 1, 0),
        (0, 3, 0),
        (0, 0, 6),
        (0, 1, 12),
    ]
    assert solve(6, [(10, 6, True)], 0, prefix_tokens=4, sim_hidden=18, sim_heads=3).pages == 2


def test_columns_are_padded_to_whole_heads() -> None:
    """Heads of 4 coordinates: a row of 6 takes two of them, and a matrix of 15 columns two tiles of
    two heads.
    """
    layout = solve(
        4, [(2, 6, False), (2, 15, False)], 0, prefix_tokens=2, sim_hidden=12, sim_heads=3
    )
    (narrow,) = layout.prefix["w0"].tiles
    assert (narrow.columns, narrow.row_width, narrow.coordinates) == (Range(0, 6), 8, Range(0, 8))
    assert [tile.columns for tile in layout.prefix["w1"].tiles] == [Range(0, 8), Range(8, 15)]
    assert layout.pages == 3


def test_vectors_fill_a_token_then_the_next_then_a_new_page() -> None:
    """Two of 5 in a token of 12, two tokens a page: six norms need three pages behind the
    matrix's.
    """
    layout = solve(5, [(2, 6, False)], 6, prefix_tokens=2, sim_hidden=12, sim_heads=2)
    found = [layout.prefix[f"{name}{i}"].tiles[0] for i in range(6) for name in ("gamma", "beta")]
    first = found[0].page
    assert [(t.page - first, t.tokens.start, t.coordinates.start) for t in found[:5]] == [
        (0, 0, 0), (0, 0, 5), (0, 1, 0), (0, 1, 5), (1, 0, 0),
    ]  # fmt: skip
    assert all(t.tokens.size == 1 and t.coordinates.size == 5 for t in found)
    assert layout.pages == first + 3


def test_too_narrow_is_refused_with_the_nearest_that_works() -> None:
    with pytest.raises(
        UsageError,
        match=r"sim_hidden is 5; expected at least 6: .* of 6 numbers. "
        "The nearest that works is 6$",
    ):
        solve(6, [(6, 6, True)], 1, sim_hidden=5)
    assert solve(6, [(6, 6, True)], 1, sim_hidden=6).sim_hidden == 6
    with pytest.raises(
        UsageError, match=r"sim_hidden is 5; expected at least 6: .* The nearest that works is 8$"
    ):
        solve(6, [(6, 6, True)], 1, sim_hidden=5, sim_heads=4)


@pytest.mark.parametrize(("heads", "nearest"), [(5, "4|6"), (13, "12"), (100, "12")])
def test_heads_that_do_not_divide_are_refused_with_the_nearest_that_works(
    heads: int, nearest: str
) -> None:
    with pytest.raises(
        UsageError,
        match=rf"sim_heads is {heads}; expected a divisor of sim_hidden, 12.* "
        rf"works is ({nearest})$",
    ):
        solve(6, [(6, 6, True)], 1, sim_hidden=12, sim_heads=heads)


def test_one_head_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"sim_heads is 1; expected at least 2: .* The nearest that works is 2$"
    ):
        solve(6, [(6, 6, True)], 1, sim_heads=1)


@pytest.mark.parametrize(
    ("heads", "most"), [({"sim_heads": 3}, 4), ({}, 6)], ids=["given heads", "free heads"]
)
def test_more_prefix_tokens_than_a_head_has_coordinates_are_refused(
    heads: dict[str, int], most: int
) -> None:
    with pytest.raises(
        UsageError,
        match=rf"prefix_tokens is 7; expected at most {most}, .* The nearest that works is {most}$",
    ):
        solve(6, [(6, 6, True)], 1, prefix_tokens=7, sim_hidden=12, **heads)
    assert (
        solve(6, [(6, 6, True)], 1, prefix_tokens=most, sim_hidden=12, **heads).prefix_tokens
        == most
    )


def test_given_heads_choose_a_width_that_they_divide() -> None:
    """With sim_heads alone there is always a D_sim that works, so it must not be refused."""
    layout = solve(6, [(6, 6, True)], 1, sim_heads=7)
    assert layout.sim_heads == 7
    assert layout.sim_hidden % 7 == 0


def test_given_prefix_tokens_choose_a_head_that_holds_them() -> None:
    layout = solve(6, [(6, 6, True)], 1, prefix_tokens=31)
    assert layout.prefix_tokens == 31
    assert layout.head_width >= 31


def test_a_matrix_as_wide_as_the_token_needs_no_other_special_case() -> None:
    layout = solve(
        4,
        [(4, 8, True), (300, 8, True), (1, 40, True)],
        2,
        prefix_tokens=3,
        sim_hidden=8,
        sim_heads=2,
    )
    write_and_read(layout)
    check_shape(layout, 4)


def test_round_trip_through_json() -> None:
    at = before("verify")
    layout = at.context.layout
    assert layout is not None
    assert layout.memory
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    apply("verify", at)


def test_derived_sizes() -> None:
    layout = solve(6, [(10, 6, True)], 2, prefix_tokens=4, sim_hidden=28, sim_heads=4)
    assert layout.prefix_numbers == layout.pages * 4 * 28
    assert layout.memory_width == 0
    assert str(Range(2, 5)) == "2:5"
    assert Range(2, 5).overlaps(Range(4, 9))
    assert not Range(2, 5).overlaps(Range(5, 9))


ranges = st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(0, 6)).map(
    lambda t: Rows(t[0], t[0] + t[1], sum(t))
)


@given(ranges, ranges)
def test_rows_that_share_one_overlap(a: Rows, b: Rows) -> None:
    """Rows of different periods may be taken to overlap though they do not; never the other way
    round.
    """
    both = math.lcm(a.period, b.period)
    shared = {r for r in range(both) if a.start <= r % a.period < a.stop} & {
        r for r in range(both) if b.start <= r % b.period < b.stop
    }
    assert a.overlaps(b) == b.overlaps(a)
    assert a.overlaps(b) or not shared
    assert bool(shared) or a.period != b.period or not a.overlaps(b)


def test_rows_name_their_slot() -> None:
    assert Rows(0, 12, 12).label("w", 12) == "w"
    assert Rows(2, 5, 12).label("w", 12) == "w[2:5]"
    assert Rows(2, 5, 6).label("w", 12) == "w[2:5 of 6]"


@pytest.mark.parametrize("where", [(0, 0, 4), (-1, 2, 4), (3, 2, 4), (2, 5, 4)])
def test_what_is_no_range_of_rows_is_refused(where: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="are no rows"):
        Rows(*where)


def test_rows_that_repeat_survive_json() -> None:
    slot = PrefixSlot("w[2:4 of 6]", "w", Rows(2, 4, 6), True, (4, 3), True, ())
    found = Layout.from_dict(
        json.loads(json.dumps(Layout(3, 12, 2, 1, {slot.name: slot}).to_dict()))
    )
    assert found.prefix[slot.name] == slot
