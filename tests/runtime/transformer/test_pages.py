"""tintc.runtime.backends.transformer.pages: auxiliary weights go into prefix tokens and come back
bit for bit, whatever the layout.
"""

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.models import FAMILIES
from tests.support.once import capture_once
from tests.support.shapes import Draw, seeds
from tests.support.stages import Stage, before
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import is_tint
from tintc.ir.layout import Layout, PrefixSlot, Range, Tile
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import prefix
from tintc.passes.place.assign_prefix_slots import assign_prefix_slots
from tintc.runtime.backends.transformer.pages import (
    FillTile,
    PrefixPages,
    ReadSlot,
    read_slot,
    read_tile,
    write_tile,
)

F64 = torch.float64
moderate = settings(max_examples=40)


def odd_model(family: str) -> Any:
    """Widths that divide nothing; GPT-2 stores weights transposed, and q, k and v in one."""
    return FAMILIES[family](hidden=10, heads=2, ffn=13, layers=2, vocab=17)


@lru_cache
def unplaced(family: str) -> Stage:
    return before("assign_prefix_slots", SimulatorConfig.exact(), model=odd_model(family))


def place(family: str, **sizes: int | None) -> tuple[Layout, dict[str, Tensor], list[str]]:
    """(layout by these sizes, the state dict, names of what operators read directly)."""
    at = unplaced(family)
    context = copy.copy(at.context)
    context.config = SimulatorConfig.exact(**sizes)
    assign_prefix_slots(at.graph, context)
    assert context.layout is not None
    reads = [
        n
        for node in at.graph.nodes
        if node.op == "call_function" and not is_tint(node, prefix)
        for n in node.all_input_nodes
    ]
    tables = [name for n in reads if (name := info(n).parameter) is not None]
    return context.layout, at.context.tensors, tables


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, int | None]:
    """K, D_sim and H_sim that fit a width of 10, or some of them."""
    heads = draw(st.integers(2, 9))
    width = draw(st.integers(-(-10 // heads), 12))
    tokens = draw(st.integers(1, width))
    given = {"prefix_tokens": tokens, "sim_hidden": heads * width, "sim_heads": heads}
    free = draw(
        st.sampled_from([(), ("prefix_tokens",), ("sim_hidden",), ("sim_heads",), tuple(given)])
    )
    return {name: None if name in free else size for name, size in given.items()}


@given(st.sampled_from(sorted(FAMILIES)), layouts())
@moderate
@pytest.mark.slow
def test_round_trip(family: str, sizes: dict[str, int | None]) -> None:
    layout, tensors, tables = place(family, **sizes)
    held = PrefixPages(layout, tensors, tables)
    found = held.tensors()
    assert list(found) == list(tensors), "the order of the state dict"
    assert all(
        torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype
        for name in tensors
    )
    assert len(held.pages) == layout.pages
    assert {tuple(page.shape) for page in held.pages} == {(layout.prefix_tokens, layout.sim_hidden)}
    assert list(held.by_name()) == [f"page_{i}" for i in range(layout.pages)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_number_is_in_a_page_or_a_table_and_padding_is_0(family: str) -> None:
    layout, tensors, tables = place(family)
    held = PrefixPages(layout, tensors, tables)
    in_slots = {slot.parameter for slot in layout.prefix.values()}
    assert set(held.direct()) == set(tensors) - in_slots
    assert set(tables) == set(held.direct())
    nonzero = sum(int((page != 0).sum()) for page in held.pages)
    assert nonzero == sum(tensors[name].numel() for name in in_slots)
    ours = {p.data_ptr() for p in held.parameters()}
    assert not ours & {tensors[name].data_ptr() for name in in_slots}


def test_a_page_can_be_changed_without_the_model() -> None:
    layout, tensors, tables = place("gpt2")
    before = {name: value.clone() for name, value in tensors.items()}
    held = PrefixPages(layout, tensors, tables)
    with torch.no_grad():
        for page in held.pages:
            page.mul_(2)
    found = held.tensors()
    for name, value in before.items():
        assert torch.equal(tensors[name], value)
        assert torch.equal(found[name], value * (1 if name in held.direct() else 2))


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Tile, tuple[int, int]]:
    """(a tile of some rows and columns of a matrix, the matrix' shape)."""
    tokens, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rows, columns, start = (draw(st.integers(1, 9)) for _ in range(3))
    top, left, first = (draw(st.integers(0, 3)) for _ in range(3))
    used = min(tokens, rows)
    row_width = -(-columns // width) * width
    where = Range(start, start + -(-rows // used) * row_width)
    tile = Tile(
        0,
        Range(top, top + rows),
        Range(left, left + columns),
        Range(first, first + used),
        where,
        row_width,
    )
    return tile, (top + rows + draw(st.integers(0, 2)), left + columns + draw(st.integers(0, 2)))


@given(tiles(), st.sampled_from([(), (3,)]), seeds)
@moderate
def test_one_tile(drawn: tuple[Tile, tuple[int, int]], batch: tuple[int, ...], seed: int) -> None:
    """Written and read, number by number; nothing else of the page changes, and the page given is
    left alone.
    """
    (tile, shape), draw = drawn, Draw(seed)
    value = draw(*batch, *shape)
    page = draw(*batch, tile.tokens.stop + 1, tile.coordinates.stop + 1)
    old, new = page.detach().clone(), write_tile(page, value, tile)
    assert torch.equal(write_tile(page.detach(), value.detach(), tile), new.detach())
    assert torch.equal(page.detach(), old)
    expected = old.clone()
    expected[
        ..., tile.tokens.start : tile.tokens.stop, tile.coordinates.start : tile.coordinates.stop
    ] = 0
    for r in range(tile.rows.size):
        for c in range(tile.columns.size):
            s, j = divmod(r, tile.tokens.size)
            at = (..., tile.tokens.start + j, tile.coordinates.start + s * tile.row_width + c)
            expected[at] = value.detach()[..., tile.rows.start + r, tile.columns.start + c]
    assert torch.equal(new.detach(), expected)
    block = value[..., tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop]
    assert torch.equal(read_tile(new, tile), block)
    weights = torch.randn(block.shape, generator=draw.generator, dtype=F64)
    found = torch.autograd.grad((read_tile(new, tile) * weights).sum(), (value, page))
    assert torch.equal(
        found[0][..., tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop],
        weights,
    )
    assert not found[1].any(), "what was there before no longer counts"


def slots() -> list[PrefixSlot]:
    """A matrix in several tiles, a bias in as many, a vector in one token, one-row and one-column
    matrices.
    """
    layout, _, _ = place("gpt2", prefix_tokens=3, sim_hidden=12, sim_heads=3)
    several = [slot for slot in layout.prefix.values() if len(slot.tiles) > 1]
    vector = next(
        slot
        for slot in layout.prefix.values()
        if slot.tiles[0].tokens.size == 1 and len(slot.shape) == 1
    )
    wide = next(slot for slot in several if len(slot.shape) == 2)
    bias = next(slot for slot in several if len(slot.shape) == 1)
    assert (
        len({tile.columns for tile in wide.tiles}) > 1
        and len({tile.rows for tile in wide.tiles}) > 1
    )
    return [wide, bias, vector]


@pytest.mark.parametrize("index", range(3), ids=["matrix", "bias", "vector"])
def test_filled_and_read_back(index: int) -> None:
    """A user's values of an update go into pages, one a sequence, and come back; autograd sees an
    identity.
    """
    slot, draw = slots()[index], Draw(0)
    numbers = ReadSlot(slot).numbers
    pages = {number: draw(3, 12) for number in numbers}
    value = draw(2, *slot.shape)
    filled = dict(pages)
    for tile in slot.tiles:
        filled[tile.page] = FillTile(tile)(filled[tile.page], value)
        assert filled[tile.page].shape == (2, 3, 12)
    found = ReadSlot(slot)(*(filled[number] for number in numbers))
    assert torch.equal(found, value)
    weights = torch.randn(found.shape, generator=draw.generator, dtype=F64)
    (gradient,) = torch.autograd.grad((found * weights).sum(), value)
    assert torch.equal(gradient, weights)
    alone = read_slot(pages, slot)
    assert alone.shape == slot.shape
    before = alone.detach().clone()
    with torch.no_grad():
        for page in pages.values():
            page.zero_()
    assert torch.equal(alone.detach(), before), "a copy"


def test_one_page_that_belongs_to_a_sequence_makes_the_slot_so() -> None:
    slot, draw = slots()[0], Draw(0)
    pages = {tile.page: draw(3, 12).detach() for tile in slot.tiles}
    number = slot.tiles[1].page
    own = {**pages, number: pages[number].expand(2, 3, 12).clone()}
    own[number][1] += 1
    found = read_slot(own, slot)
    assert found.shape == (2, *slot.shape)
    assert torch.equal(found[0], read_slot(pages, slot))
    assert not torch.equal(found[1], found[0])


def test_slot_values_are_what_operators_read() -> None:
    """By rows, after transposing: each slot of GPT-2's joined q, k and v weight is a third of
    it.
    """
    layout, tensors, tables = place("gpt2")
    pages = dict(enumerate(PrefixPages(layout, tensors, tables).pages))
    assert any(slot.transpose and slot.rows.start > 0 for slot in layout.prefix.values())
    for slot in layout.prefix.values():
        wanted = prefix(
            tensors[slot.parameter],
            slot.rows.start,
            slot.rows.stop,
            slot.rows.period,
            slot.transpose,
        )
        assert torch.equal(read_slot(pages, slot), wanted)
    assert all(
        layout.prefix[name].shape == read_slot(pages, layout.prefix[name]).shape
        for name in layout.prefix
    )


@pytest.mark.slow
def test_pages_are_parameters_in_the_models_dtype() -> None:
    layout, _, tables = place("opt")
    tensors = {
        name: value.bfloat16() for name, value in capture_once(odd_model("opt")).tensors.items()
    }
    held = PrefixPages(layout, tensors, tables)
    assert all(page.dtype == torch.bfloat16 and page.requires_grad for page in held.pages)
    assert all(torch.equal(value, tensors[name]) for name, value in held.tensors().items())
