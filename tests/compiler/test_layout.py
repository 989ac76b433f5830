"""Slots of random models: a simulation of the prefix tokens shows that every number has a place of its own."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from tests.passes.stages import apply, before
from tintc.compiler.builder import Builder
from tintc.compiler.config import SimulatorConfig
from tintc.compiler.errors import UsageError
from tintc.compiler.layout import Layout, PrefixSlot, Range
from tintc.compiler.node_meta import NodeInfo
from tintc.compiler.pass_manager import Context
from tintc.passes.assign_prefix_slots import assign_prefix_slots

Shapes = list[tuple[int, int, bool]]  # outputs, inputs, bias


def a_graph(hidden: int, linears: Shapes, norms: int) -> tuple[fx.Graph, Context]:
    """Layers side by side, each on an input of its own; the slot pass asks for no more."""
    graph, build = fx.Graph(), None
    context = Context(SimulatorConfig())
    context.facts.hidden = hidden
    build = Builder(graph)

    def parameter(name: str, *shape: int) -> fx.Node:
        node = build.placeholder(name, shape, role="parameter")
        node.meta["tint"] = NodeInfo(shape=shape, role="parameter", parameter=name)
        return build.call("prefix", node, 0, shape[0], False, slot=name, trainable=True)

    last = None
    for i, (rows, columns, has_bias) in enumerate(linears):
        x = build.placeholder(f"x{i}", ("B", "T", columns), role="input")
        bias = parameter(f"b{i}", rows) if has_bias else None
        last = build.call("linear_forward", x, parameter(f"w{i}", rows, columns), bias)
    for i in range(norms):
        x = build.placeholder(f"n{i}", ("B", "T", hidden), role="input")
        last = build.call("norm_forward", x, parameter(f"gamma{i}", hidden), parameter(f"beta{i}", hidden), 1e-5, "layer")
    graph.output(last)
    return graph, context


def solve(hidden: int, linears: Shapes, norms: int, **fields: Any) -> Layout:
    graph, context = a_graph(hidden, linears, norms)
    context.config = SimulatorConfig(**fields)
    assign_prefix_slots(graph, context)
    assert context.layout is not None
    return context.layout


def write_and_read(layout: Layout) -> None:
    """Writes every slot's numbers, each of its own value, into empty prefix tokens, and reads all of them back."""
    tokens = torch.zeros(layout.pages, layout.prefix_tokens, layout.sim_hidden, dtype=torch.int64)
    count = 1
    values = {}
    for slot in layout.prefix.values():
        values[slot.name] = torch.arange(count, count + slot.numbers).reshape(slot.shape if len(slot.shape) == 2 else (*slot.shape, 1))
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
    """((page, token, coordinate), row, column) of each number: rows side by side in a token, as TINT.md stacks them.

    A bias stands whole in one token: its tile has all of its rows in the first of its tokens."""
    found = []
    for tile in slot.tiles:
        for i in range(tile.rows.size):
            token, s = divmod(i, tile.rows_per_token)
            for j in range(tile.columns.size):
                where = (tile.page, tile.tokens.start + token, tile.coordinates.start + s * tile.columns.size + j)
                assert where[1] < tile.tokens.stop
                assert where[2] < tile.coordinates.stop
                found.append((where, tile.rows.start + i, tile.columns.start + j))
    return found


shapes = st.lists(st.tuples(st.integers(1, 23), st.integers(1, 23), st.booleans()), min_size=1, max_size=5)


@given(st.integers(1, 17), shapes, st.integers(0, 5))
@settings(max_examples=60)
def test_every_number_has_a_place_of_its_own(hidden: int, linears: Shapes, norms: int) -> None:
    layout = solve(hidden, linears, norms)
    write_and_read(layout)
    assert layout.sim_hidden % layout.sim_heads == 0
    assert layout.sim_hidden >= 2 * hidden
    assert set(layout.prefix) == {*(f"w{i}" for i in range(len(linears))), *(f"b{i}" for i, s in enumerate(linears) if s[2])} | {
        f"{name}{i}" for i in range(norms) for name in ("gamma", "beta")
    }


@given(st.integers(1, 9), shapes, st.integers(0, 3), st.integers(1, 40), st.integers(0, 60), st.data())
@settings(max_examples=60)
def test_given_sizes_are_kept(hidden: int, linears: Shapes, norms: int, tokens: int, extra: int, data: st.DataObject) -> None:
    """Any K works, and any D_sim that holds two residual streams: larger matrices take more pages."""
    wide = 2 * hidden + extra
    heads = data.draw(st.sampled_from([h for h in range(1, wide + 1) if wide % h == 0]))
    layout = solve(hidden, linears, norms, prefix_tokens=tokens, sim_hidden=wide, sim_heads=heads)
    assert (layout.prefix_tokens, layout.sim_hidden, layout.sim_heads) == (tokens, wide, heads)
    write_and_read(layout)


def test_a_linear_layer_lies_as_tint_stacks_it() -> None:
    """K = 4, 10 rows: S = 3 rows a token, then the biases; S * D_in + D_out = 28 numbers fit D_sim = 28."""
    layout = solve(6, [(10, 6, True)], 0, prefix_tokens=4, sim_hidden=28, sim_heads=2)
    (weight,), (bias,) = layout.prefix["w0"].tiles, layout.prefix["b0"].tiles
    assert (weight.rows_per_token, weight.tokens, weight.coordinates) == (3, Range(0, 4), Range(0, 18))
    assert (bias.page, bias.coordinates) == (weight.page, Range(18, 28))
    assert layout.pages == 1
    assert solve(6, [(10, 6, True)], 0, prefix_tokens=4, sim_hidden=27, sim_heads=3).pages == 2


def test_too_narrow_is_refused_with_the_nearest_that_works() -> None:
    with pytest.raises(UsageError, match=r"sim_hidden is 11; expected at least 12.* The nearest that works is 12"):
        solve(6, [(6, 6, True)], 1, sim_hidden=11)
    assert solve(6, [(6, 6, True)], 1, sim_hidden=12).sim_hidden == 12


@pytest.mark.parametrize(("heads", "nearest"), [(5, "4|6"), (13, "12"), (100, "12")])
def test_heads_that_do_not_divide_are_refused_with_the_nearest_that_works(heads: int, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"sim_heads is {heads}; expected a divisor of sim_hidden, 12.* works is ({nearest})$"):
        solve(6, [(6, 6, True)], 1, sim_hidden=12, sim_heads=heads)


def test_given_heads_choose_a_width_that_they_divide() -> None:
    """With sim_heads alone there is always a D_sim that works, so it must not be refused."""
    layout = solve(6, [(6, 6, True)], 1, sim_heads=7)
    assert layout.sim_heads == 7
    assert layout.sim_hidden % 7 == 0


def test_a_matrix_as_wide_as_the_token_needs_no_other_special_case() -> None:
    write_and_read(solve(4, [(4, 8, True), (300, 8, True), (1, 40, True)], 2, prefix_tokens=3, sim_hidden=8))


def test_round_trip_through_json() -> None:
    at = before("verify")
    layout = at.context.layout
    assert layout is not None
    assert layout.memory
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    apply("verify", at)


def test_derived_sizes() -> None:
    layout = solve(6, [(10, 6, True)], 2, prefix_tokens=4, sim_hidden=28)
    assert layout.prefix_numbers == layout.pages * 4 * 28
    assert layout.memory_width == 0
    assert str(Range(2, 5)) == "2:5"
    assert Range(2, 5).overlaps(Range(4, 9))
    assert not Range(2, 5).overlaps(Range(5, 9))
