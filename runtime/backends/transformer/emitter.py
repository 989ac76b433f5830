"""A transformer program under construction, and what the rules of `rules/` may do to it.

The program is a torch.fx graph of module calls. A module takes the residual stream (all input
tokens, with the coordinates that `assign_memory_slots` gave each activation) or a page of prefix
tokens, and returns it with one range rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from tintc.ir.builder import input_node, outputs
from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import CompilerBug
from tintc.ir.layout import Tile
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import segment
from tintc.ir.ops.states import zero_state
from tintc.ir.program import Program
from tintc.ir.rules import RuleTable
from tintc.runtime.backends.transformer.modules.parts import Counted, Layer, Place, Range
from tintc.runtime.backends.transformer.structure import Structure

Sizes = dict[str, Any]  # constants of a module, by the names of its arguments


class Emitter:
    """stream: the newest state of the input tokens. pages: of each page's prefix tokens;
    first_pages: what they are before any module. values: inputs, what is computed from them alone,
    and rates. needed: lowered nodes that the program computes. states: slots of the inner rule.
    """

    code: fx.Node  # the position code
    stream: fx.Node

    def __init__(self, program: Program, structure: Structure, needed: set[fx.Node]) -> None:
        self.layout, self.structure, self.needed = program.layout, structure, needed
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.pages: dict[int, fx.Node] = {}
        self.first_pages: dict[int, fx.Node] = {}
        self.states = frozenset(outputs(program.graph).get("states", {}))
        self._held: dict[str, fx.Node] = {}  # slot -> lowered node whose value its pages hold
        self._segment = input_node(program.graph, "segment")

    # Where things are

    def range(self, node: fx.Node, start: int = 0, stop: int | None = None) -> Range:
        """Coordinates start <= c < stop of an activation in the stream."""
        root = node
        while is_tint(root, segment):
            root = argument(root, "x")
        slot = self.layout.memory[root.name].coordinates
        tokens = self.values[self._segment] if info(node).shape[1] == "S" else None
        return Range(slot.start + start, slot.start + (slot.size if stop is None else stop), tokens)

    def ranges(self, node: fx.Node, *names: str) -> list[Range]:
        """Whole activations that a node reads, by the names of its arguments."""
        return [self.range(argument(node, name)) for name in names]

    def inputs(self, node: fx.Node, *names: str) -> list[Any]:
        """Inputs and tables that a node reads; None for those that were left out."""
        read = (argument(node, name) for name in names)
        return [None if source is None else self.values[source] for source in read]

    def tiles(self, weight: fx.Node) -> tuple[Tile, ...]:
        """Where the pages hold a slot's value."""
        slot = info(weight).slot
        assert slot is not None
        self.check_held(slot, weight)
        return self.layout.prefix[slot].tiles

    def places(self, node: fx.Node) -> tuple[Tile, ...]:
        """Where the pages will hold a node's value: the places of its slot."""
        return self.layout.prefix[info(node).slot or ""].tiles

    def descended(self, weight: fx.Node) -> tuple[tuple[Tile, ...], bool]:
        """(where a weight is descended, whether the descent adds to what is there): one from zero
        replaces what the pages hold by then.
        """
        adds = not is_tint(weight, zero_state) or self._held.get(info(weight).slot or "") is weight
        return (self.tiles(weight) if adds else self.places(weight)), adds

    def hold(self, node: fx.Node) -> None:
        """From here on the pages hold this value of its slot."""
        self._held[info(node).slot or ""] = node

    def holds_any(self, slot: str) -> bool:
        """Whether a value of the slot was read or written before."""
        return slot in self._held

    def check_held(self, slot: str, node: fx.Node) -> None:
        """Raises CompilerBug where the pages hold another value of the slot than `node`."""
        if self._held.get(slot) is not node:
            raise CompilerBug(
                f"the pages of {slot} hold {self._held.get(slot)} where {node.name} is read"
            )

    # Calls

    def function(self, function: Callable[..., Any], *args: Any, name: str) -> fx.Node:
        """A call that is no part of the transformer: of what inputs alone decide."""
        return self.graph.create_node("call_function", function, args, name=name)

    def write(
        self, node: fx.Node, kind: type[Layer], sizes: Sizes, *args: Any, part: str = ""
    ) -> None:
        """A module that rewrites a range of the stream."""
        self.stream = self._call(node, part, kind, sizes, self.stream, self.code, *args)

    def update(
        self,
        node: fx.Node,
        tile: Tile,
        kind: type[Layer],
        sizes: Sizes,
        *args: Any,
        part: str = "",
    ) -> None:
        """A module that rewrites a place of a page."""
        page = self.pages[tile.page]
        self.pages[tile.page] = self._call(
            node, part, kind, sizes, page, self.code, self.stream, place_of(tile), *args
        )

    def number(
        self, node: fx.Node, kind: type[Counted], sizes: Sizes, *args: Any, part: str = ""
    ) -> fx.Node:
        """A module that computes one number of each sequence, or one of all."""
        return self._call(node, part, kind, sizes, *args)

    def _call(
        self, node: fx.Node, part: str, kind: type[Counted], sizes: Sizes, *args: Any
    ) -> fx.Node:
        module = self.structure.get(node, part, kind, sizes)
        return self.graph.create_node("call_module", module, args, name=f"{node.name}{part}")


TransformerRule = Callable[[Emitter, fx.Node], None]
transformer_rule = RuleTable[TransformerRule](
    "transformer", needed_by=lambda o: o.kind != "optimization"
)


def width_of(node: fx.Node) -> int:
    """Numbers in the last dimension."""
    width = info(node).shape[-1]
    assert isinstance(width, int)
    return width


def place_of(tile: Tile) -> Place:
    """Where a page holds a tile."""
    return Place(tile.tokens.start, tile.tokens.stop, tile.coordinates.start, tile.coordinates.stop)
