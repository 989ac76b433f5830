"""Auxiliary weights <-> prefix tokens: the one place that knows how a slot's numbers lie in pages.

Legend: a page is (K, D_sim) or, after a descent, (B, K, D_sim): one a sequence. A slot's value is
(O, I) or (D,), or (B, O, I) or (B, D). Everything here is differentiable and copies: no result
shares memory with a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintc.ir.inputs import is_wide_table
from tintc.ir.layout import Layout, PrefixSlot, Tile
from tintc.ir.ops.linear import prefix
from tintc.runtime.prefix import PrefixEmbeddings, put_rows


def write_tile(page: Tensor, value: Tensor, tile: Tile) -> Tensor:
    """The page with one tile of a slot's value in it; padding is 0. A vector has one dimension less
    than the page.
    """
    matrix = value if value.ndim == page.ndim else value.unsqueeze(-1)
    block = matrix[..., tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop]
    padding = (
        0,
        tile.row_width - tile.columns.size,
        0,
        tile.groups * tile.tokens.size - tile.rows.size,
    )
    rows = (
        torch.unflatten(F.pad(block, padding), -2, (tile.groups, tile.tokens.size))
        .transpose(-3, -2)
        .flatten(-2)
    )
    page = page.clone()
    page[
        ..., tile.tokens.start : tile.tokens.stop, tile.coordinates.start : tile.coordinates.stop
    ] = rows
    return page


def read_tile(page: Tensor, tile: Tile) -> Tensor:
    """(..., rows, columns) of one tile."""
    held = page[
        ..., tile.tokens.start : tile.tokens.stop, tile.coordinates.start : tile.coordinates.stop
    ]
    rows = (
        torch.unflatten(held, -1, (tile.groups, tile.row_width)).transpose(-3, -2).flatten(-3, -2)
    )
    return rows[..., : tile.rows.size, : tile.columns.size]


def read_slot(pages: Mapping[int, Tensor], slot: PrefixSlot) -> Tensor:
    """A slot's whole value from the pages that hold its tiles; one value a sequence if any page
    belongs to a sequence.
    """
    first = pages[slot.tiles[0].page]
    batch = max((pages[tile.page].shape[:-2] for tile in slot.tiles), key=len)
    value = first.new_zeros((*batch, slot.shape[0], slot.shape[1] if len(slot.shape) == 2 else 1))
    for tile in slot.tiles:
        value[..., tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop] = (
            read_tile(pages[tile.page], tile)
        )
    return value if len(slot.shape) == 2 else value.squeeze(-1)


class ReadSlot(nn.Module):
    """A slot's value from its pages, in the order of their numbers: what a user gets to see of an
    update. No parameters.
    """

    def __init__(self, slot: PrefixSlot) -> None:
        super().__init__()
        self.slot = slot
        self.numbers = sorted({tile.page for tile in slot.tiles})

    def forward(self, *pages: Tensor) -> Tensor:
        return read_slot(dict(zip(self.numbers, pages, strict=True)), self.slot)


class FillTile(nn.Module):
    """One page a sequence, with a given slot value in it. No parameters."""

    def __init__(self, tile: Tile) -> None:
        super().__init__()
        self.tile = tile

    def forward(self, page: Tensor, value: Tensor) -> Tensor:
        return write_tile(page.expand(len(value), *page.shape[-2:]), value, self.tile)


class PrefixPages(nn.Module):
    """The prefix embeddings of the transformer back end, and the tables that are no prefix tokens.

    pages: `pages` parameters of (K, D_sim), padding included. tables: token and position
    embeddings, the head, and what else of the auxiliary state dict lies in no slot, under the
    auxiliary names. A parameter that is read through a slot and directly as well (a frozen layer
    tied to a table) is in both, and counted in both; the table's copy is the one that `tensors`
    gives. Pages of what the inner rule keeps hold zeros, which no outer training changes.
    """

    def __init__(
        self, layout: Layout, tensors: Mapping[str, Tensor], tables: Sequence[str]
    ) -> None:
        super().__init__()
        self.layout = layout
        covered = {slot.parameter for slot in layout.prefix.values()} - set(tables)
        self._order = list(tensors)
        self._shapes = {name: tensors[name].shape for name in covered}
        self.tables = PrefixEmbeddings(
            {name: tensor for name, tensor in tensors.items() if name not in covered}
        )
        like = next(
            tensor
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and not is_wide_table(name)
        )
        filled = [
            like.new_zeros(layout.prefix_tokens, layout.sim_hidden) for _ in range(layout.pages)
        ]
        weights = [slot for slot in layout.prefix.values() if not slot.zero]
        for slot in weights:
            value = prefix(
                tensors[slot.parameter].detach(),
                slot.rows.start,
                slot.rows.stop,
                slot.rows.period,
                slot.transpose,
            )
            for tile in slot.tiles:
                filled[tile.page] = write_tile(filled[tile.page], value, tile)
        learn = {tile.page for slot in weights for tile in slot.tiles}
        self.pages = nn.ParameterList(
            nn.Parameter(page, requires_grad=index in learn) for index, page in enumerate(filled)
        )

    def tensors(self) -> dict[str, Tensor]:
        """The auxiliary state dict, read back from the prefix tokens and the tables."""
        found = self.tables.tensors()
        pages = dict(enumerate(self.pages))
        for slot in self.layout.prefix.values():
            if slot.zero or slot.parameter not in self._shapes:
                continue  # the weight's own slot or the table has it
            value = read_slot(pages, slot)
            whole = found.get(slot.parameter)
            if whole is None:
                whole = value.new_zeros(self._shapes[slot.parameter])
            put_rows(whole, slot, value)
            found[slot.parameter] = whole
        return {name: found[name] for name in self._order}

    def by_name(self) -> dict[str, Tensor]:
        """The pages as programs call them: `page_0`, `page_1`, ..."""
        return {f"page_{index}": page for index, page in enumerate(self.pages)}

    def direct(self) -> dict[str, Tensor]:
        """What operators read by auxiliary name: the tables alone."""
        return self.tables.tensors()
