"""The transformer back end: lowers `tint` operators to a transformer over prefix and input tokens
(TINT.md section 3).

Each operator becomes one module of `runtime/modules` for each tile of the weight that it reads. A
module takes the residual stream (all input tokens, with the coordinates that `assign_memory_slots`
gave each activation) or a page of prefix tokens, and returns it with one range rewritten. Weights
reach the stream through pages alone, and nothing else is carried from module to module. The result
is a torch.fx graph of module calls: `program.code` reads as the list of layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from tintc.ir.builder import ancestors, input_node
from tintc.ir.builder import outputs as named_outputs
from tintc.ir.dialect import OPERATORS, argument, is_tint, tint_name
from tintc.ir.errors import CompilerBug
from tintc.ir.inputs import CODE
from tintc.ir.layout import Tile
from tintc.ir.node_meta import info
from tintc.ir.outputs import Output
from tintc.ir.program import Program
from tintc.runtime.backends.transformer.modules import (
    activation,
    attention,
    elementwise,
    embedding,
    linear,
    norm,
    position,
)
from tintc.runtime.backends.transformer.modules.parts import Layer, Place, Range, blank, copied
from tintc.runtime.backends.transformer.pages import FillTile, ReadSlot
from tintc.runtime.backends.transformer.structure import Structure, unused_name


def emit(
    program: Program, structure: Structure, outputs: Sequence[str], *, from_updates: bool = False
) -> fx.GraphModule:
    """A module that computes some of the program's outputs, as a dict, from inputs, tables, pages
    (`page_0`, ...) and the position code, passed by name.

    from_updates: the updated slot values are inputs too (named like their nodes) and no training
    happens.
    """
    return _Emitter(program, structure, outputs, from_updates).run()


def tables(program: Program) -> list[str]:
    """Auxiliary parameters that operators read directly, not through a prefix slot: embeddings and
    the head.
    """
    reads = (
        n
        for node in program.graph.nodes
        if node.op == "call_function" and not is_tint(node, "prefix")
        for n in node.all_input_nodes
    )
    return list(dict.fromkeys(name for n in reads if (name := info(n).parameter) is not None))


class _Emitter:
    """Walks the lowered graph once. stream: the newest state of the input tokens; pages: of each
    page's prefix tokens.
    """

    def __init__(
        self, program: Program, structure: Structure, outputs: Sequence[str], from_updates: bool
    ) -> None:
        self.layout, self.structure = program.layout, structure
        self.lowered, self.emitted = program.graph, fx.Graph()
        returned = named_outputs(program.graph)
        self.prompt, self.segment = (
            input_node(program.graph, name) for name in ("input_ids", "segment")
        )
        self.wanted: dict[str, Any] = {
            name: value for name, value in returned.items() if name in outputs
        }
        self.given = dict(returned["updates"]) if from_updates else {}
        roots: list[fx.Node] = []
        fx.node.map_arg(self.wanted, roots.append)
        self.needed = ancestors(roots, stop=set(self.given.values()))
        self.values: dict[fx.Node, Any] = {}  # inputs, and outputs as they are made
        self.pages: dict[int, fx.Node] = {}
        self.held: dict[str, fx.Node] = {}  # slot -> lowered node whose value its pages hold
        self.adapters: dict[
            str, nn.Module
        ] = {}  # between slot values and pages; no parts of the transformer

    def run(self) -> fx.GraphModule:
        self._placeholders()
        self.stream = self._function(
            blank, self.values[self.prompt], self.code, self.layout.memory_width, name="stream"
        )
        computed = self.needed - set(self.given.values())
        for node in self.lowered.nodes:
            if node in computed and node.op == "call_function":
                self._lower(node)
        self.emitted.output(self._results())
        root = nn.Module()
        for node in self.emitted.nodes:
            if node.op == "call_module" and node.target not in root._modules:
                root.add_module(
                    node.target,
                    self.adapters.get(node.target) or self.structure.layers[node.target],
                )
        return fx.GraphModule(root, self.emitted, class_name="TransformerProgram")

    def _placeholders(self) -> None:
        """Inputs and tables, the position code, pages, and the updated slot values where they are
        given.
        """
        placed = {slot for node in self.needed if (slot := info(node).slot) is not None}
        read_directly = {
            n for user in self.needed if not is_tint(user, "prefix") for n in user.all_input_nodes
        }
        for node in self.lowered.nodes:
            if node.op == "placeholder" and (node in read_directly or node is self.prompt):
                self.values[node] = self.emitted.placeholder(node.name)
        self.code = self.emitted.placeholder(CODE)
        for index in sorted(
            {tile.page for name in placed for tile in self.layout.prefix[name].tiles}
        ):
            self.pages[index] = self.emitted.placeholder(f"page_{index}")
        values = {slot: self.emitted.placeholder(node.name) for slot, node in self.given.items()}
        for slot, value in values.items():
            self.held[slot] = self.given[slot]
            for index, tile in enumerate(self.layout.prefix[slot].tiles):
                name = f"fill_{self.given[slot].name}_tile_{index}"
                self.pages[tile.page] = self._adapt(
                    name, FillTile(tile), self.pages[tile.page], value
                )

    def _results(self) -> dict[str, Any]:
        """The outputs by name; updated slots are read back from their pages."""
        found: dict[str, Any] = {
            name: self.values[node] for name, node in self.wanted.items() if name != "updates"
        }
        if "updates" in self.wanted:
            found["updates"] = {
                slot: self._slot_value(slot, node) for slot, node in self.wanted["updates"].items()
            }
        return found

    def _slot_value(self, slot: str, node: fx.Node) -> fx.Node:
        self._check_held(slot, node)
        reader = ReadSlot(self.layout.prefix[slot])
        return self._adapt(
            f"read_{node.name}", reader, *(self.pages[number] for number in reader.numbers)
        )

    def _adapt(self, name: str, adapter: nn.Module, *args: fx.Node) -> fx.Node:
        name = unused_name(name, {*self.adapters, *self.structure.layers})
        self.adapters[name] = adapter
        return self.emitted.create_node("call_module", name, args, name=name)

    def _lower(self, node: fx.Node) -> None:
        name = tint_name(node)
        if name == "prefix":
            self.held.setdefault(info(node).slot or "", node)
        elif node.target is operator.getitem:
            pass  # its operator has written it
        elif name in ("segment", "segment_mask", "window_mask"):
            self._of_inputs(node)
        else:
            rule: Callable[[fx.Node], None] | None = getattr(self, name or "", None)
            if rule is None:
                raise CompilerBug(f"the transformer back end has no rule for tint.{name}")
            rule(node)
        # taken out at once: later modules use these coordinates again
        for key in (Output.LOGITS.value, Output.INITIAL_LOGITS.value):
            if self.wanted.get(key) is node:
                self.values[node] = self._function(copied, self.stream, self._range(node), name=key)

    def _of_inputs(self, node: fx.Node) -> None:
        """First tokens of an activation are a range of fewer tokens; of an input, a slice. Masks
        follow from inputs alone.
        """
        if argument(node, "x" if is_tint(node, "segment") else "mask") in self.values:
            implementation = OPERATORS[tint_name(node) or ""].implementation
            self.values[node] = self._function(
                implementation, *fx.node.map_arg(node.args, self.values.__getitem__), name=node.name
            )

    # Where things are

    def _range(self, node: fx.Node, start: int = 0, stop: int | None = None) -> Range:
        """Coordinates start <= c < stop of an activation in the stream."""
        root = node
        while is_tint(root, "segment"):
            root = argument(root, "x")
        slot = self.layout.memory[root.name].coordinates
        tokens = self.values[self.segment] if info(node).shape[1] == "S" else None
        return Range(slot.start + start, slot.start + (slot.size if stop is None else stop), tokens)

    def _tiles(self, weight: fx.Node) -> tuple[Tile, ...]:
        slot = info(weight).slot
        assert slot is not None
        self._check_held(slot, weight)
        return self.layout.prefix[slot].tiles

    def _check_held(self, slot: str, node: fx.Node) -> None:
        if self.held.get(slot) is not node:
            raise CompilerBug(
                f"the pages of {slot} hold {self.held.get(slot)} where {node.name} is read"
            )

    # Calls

    def _function(self, function: Callable[..., Any], *args: Any, name: str) -> fx.Node:
        return self.emitted.create_node("call_function", function, args, name=name)

    def _call(
        self, node: fx.Node, part: str, kind: type[Layer], sizes: dict[str, Any], *args: Any
    ) -> fx.Node:
        module = self.structure.get(node, part, kind, sizes)
        return self.emitted.create_node("call_module", module, args, name=f"{node.name}{part}")

    def _write(
        self, node: fx.Node, kind: type[Layer], sizes: dict[str, Any], *args: Any, part: str = ""
    ) -> None:
        """A module that rewrites a range of the stream."""
        self.stream = self._call(node, part, kind, sizes, self.stream, self.code, *args)

    def _update(
        self,
        node: fx.Node,
        tile: Tile,
        kind: type[Layer],
        sizes: dict[str, Any],
        *args: Any,
        part: str = "",
    ) -> None:
        """A module that rewrites a place of a page."""
        page = self.pages[tile.page]
        self.pages[tile.page] = self._call(
            node, part, kind, sizes, page, self.code, self.stream, _place(tile), *args
        )

    # One rule an operator

    def embedding(self, node: fx.Node) -> None:
        table, index = (self.values[argument(node, name)] for name in ("table", "index"))
        self._write(
            node,
            embedding.Embedding,
            {"offset": argument(node, "offset")},
            table,
            index,
            self._range(node),
        )

    def residual(self, node: fx.Node) -> None:
        x, y = (self._range(argument(node, name)) for name in ("x", "y"))
        self._write(node, elementwise.Residual, {}, x, y, self._range(node))

    def multiply(self, node: fx.Node) -> None:
        x, y = (self._range(argument(node, name)) for name in ("x", "y"))
        self._write(node, elementwise.Multiply, {"size": _width(node)}, x, y, self._range(node))

    def scale(self, node: fx.Node) -> None:
        self._write(
            node,
            elementwise.Scale,
            {"factor": argument(node, "factor")},
            self._range(argument(node, "x")),
            self._range(node),
        )

    def rotary(self, node: fx.Node) -> None:
        sizes = {name: argument(node, name) for name in ("heads", "pairing", "transpose")}
        sizes["turned"] = _width(argument(node, "cos"))
        ranges = [self._range(argument(node, name)) for name in ("x", "cos", "sin")]
        self._write(node, position.Rotary, sizes, *ranges, self._range(node))

    def linear_forward(self, node: fx.Node) -> None:
        x, weight, bias = (argument(node, name) for name in ("x", "weight", "bias"))
        if info(weight).slot is None:
            table, shift = self.values[weight], None if bias is None else self.values[bias]
            self._write(
                node, embedding.HeadForward, {}, table, shift, self._range(x), self._range(node)
            )
            return
        self._through_tiles(node, linear.LinearForward, weight, x, "columns", "rows")
        if bias is not None:
            self._shift(node, bias)

    def _through_tiles(
        self,
        node: fx.Node,
        kind: type[Layer],
        weight: fx.Node,
        source: fx.Node,
        reads: str,
        writes: str,
    ) -> None:
        """One module a tile, from one axis of the weight to the other; tiles behind the first on
        the read axis add to its result.
        """
        for index, tile in enumerate(self._tiles(weight)):
            part, result = getattr(tile, reads), getattr(tile, writes)
            ranges = (
                self._range(source, part.start, part.stop),
                self._range(node, result.start, result.stop),
            )
            sizes = {**self._sizes(tile), "add": part.start > 0}
            self._write(
                node,
                kind,
                sizes,
                self.pages[tile.page],
                _place(tile),
                *ranges,
                part=f"_tile_{index}",
            )

    def _shift(self, node: fx.Node, bias: fx.Node) -> None:
        """Adds a bias or a norm's shift to the node's range."""
        for index, tile in enumerate(self._tiles(bias)):
            result, pieces = self._along(node, bias, tile)
            kind: type[Layer] = linear.BiasForward
            sizes = self._sizes(tile)
            if _is_vector(tile):
                kind, sizes = (
                    linear.VectorForward,
                    {"size": result.stop - result.start, "pieces": pieces},
                )
            self._write(
                node,
                kind,
                sizes,
                self.pages[tile.page],
                _place(tile),
                result,
                part=f"_bias_tile_{index}",
            )

    def _along(self, node: fx.Node, bias: fx.Node, tile: Tile) -> tuple[Range, int]:
        """(coordinates of an activation that a tile of a bias is for, how many pieces of them share
        it): one but for norms of heads.
        """
        pieces = _width(node) // _width(bias)
        return (
            (self._range(node, tile.rows.start, tile.rows.stop), 1)
            if pieces == 1
            else (self._range(node), pieces)
        )

    def linear_backward(self, node: fx.Node) -> None:
        dy, weight = argument(node, "dy"), argument(node, "weight")
        if info(weight).slot is None:
            self._write(
                node,
                embedding.HeadBackward,
                {},
                self.values[weight],
                self._range(dy),
                self._range(node),
            )
            return
        self._through_tiles(node, linear.LinearBackward, weight, dy, "rows", "columns")

    def linear_descent(self, node: fx.Node) -> None:
        weight, dy, x, rate = (argument(node, name) for name in ("weight", "dy", "x", "inner_lr"))
        for index, tile in enumerate(self._tiles(weight)):
            ranges = (
                self._range(dy, tile.rows.start, tile.rows.stop),
                self._range(x, tile.columns.start, tile.columns.stop),
            )
            self._update(
                node,
                tile,
                linear.LinearDescent,
                self._sizes(tile),
                *ranges,
                self.values[rate],
                part=f"_tile_{index}",
            )
        self.held[info(node).slot or ""] = node

    def bias_descent(self, node: fx.Node) -> None:
        bias, dy, rate = (argument(node, name) for name in ("bias", "dy", "inner_lr"))
        for index, tile in enumerate(self._tiles(bias)):
            source, pieces = self._along(dy, bias, tile)
            kind: type[Layer] = linear.BiasDescent
            sizes = self._sizes(tile)
            if _is_vector(tile):
                kind, sizes = (
                    linear.VectorDescent,
                    {"size": source.stop - source.start, "pieces": pieces},
                )
            self._update(node, tile, kind, sizes, source, self.values[rate], part=f"_tile_{index}")
        self.held[info(node).slot or ""] = node

    def _sizes(self, tile: Tile) -> dict[str, Any]:
        pieces = -(-tile.row_width // self.layout.head_width)
        sizes = {"rows": tile.rows.size, "columns": tile.columns.size, "tokens": tile.tokens.size}
        return {**sizes, "rows_each": tile.groups, "pieces": pieces}

    def _gain(self, gamma: fx.Node | None) -> tuple[bool, fx.Node | None, Place | None]:
        """(whether there is a gain, its page, its place)."""
        if gamma is None:
            return False, None, None
        (tile,) = self._tiles(gamma)
        return True, self.pages[tile.page], _place(tile)

    def norm_forward(self, node: fx.Node) -> None:
        x, gamma, beta = (argument(node, name) for name in ("x", "gamma", "beta"))
        gain, page, place = self._gain(gamma)
        sizes = {**_norm_sizes(node), "gain": gain, "offset": argument(node, "offset")}
        self._write(node, norm.NormForward, sizes, page, place, self._range(x), self._range(node))
        if beta is not None:
            self._shift(node, beta)

    def norm_backward(self, node: fx.Node) -> None:
        dy, x, gamma = (argument(node, name) for name in ("dy", "x", "gamma"))
        gain, page, place = self._gain(gamma)
        sizes = {**_norm_sizes(node), "gain": gain, "offset": argument(node, "offset")}
        if sizes["kind"] == "scale":  # linear, and its own transpose
            self._write(
                node, norm.NormForward, sizes, page, place, self._range(dy), self._range(node)
            )
            return
        layer: type[Layer] = norm.NormBackwardExact
        if argument(node, "gradient") == "first_order":
            layer, sizes["scale"] = norm.NormBackward, argument(node, "scale")
        self._write(
            node, layer, sizes, page, place, self._range(dy), self._range(x), self._range(node)
        )

    def norm_descent(self, node: fx.Node) -> None:
        gamma, dy, x, rate = (argument(node, name) for name in ("gamma", "dy", "x", "inner_lr"))
        (tile,) = self._tiles(gamma)
        self._update(
            node,
            tile,
            norm.NormDescent,
            _norm_sizes(node),
            self._range(dy),
            self._range(x),
            self.values[rate],
        )
        self.held[info(node).slot or ""] = node

    def activation_forward(self, node: fx.Node) -> None:
        sizes = {"kind": argument(node, "kind")}
        self._write(
            node,
            activation.ActivationForward,
            sizes,
            self._range(argument(node, "x")),
            self._range(node),
        )

    def activation_backward(self, node: fx.Node) -> None:
        sizes = {"size": _width(node), "kind": argument(node, "kind")}
        layer: type[Layer] = activation.ActivationBackwardExact
        if argument(node, "gradient") == "first_order":
            layer, sizes["scale"] = activation.ActivationBackward, argument(node, "scale")
        dy, x = (self._range(argument(node, name)) for name in ("dy", "x"))
        self._write(node, layer, sizes, dy, x, self._range(node))

    def attention_forward(self, node: fx.Node) -> None:
        self._attend(
            node,
            attention.AttentionForward,
            argument(node, "v"),
            ("q", "k", "v"),
            self._range(node),
        )

    def attention_backward_value(self, node: fx.Node) -> None:
        self._attend(
            node, attention.AttentionBackwardValue, node, ("do", "q", "k"), self._range(node)
        )

    def attention_backward_full(self, node: fx.Node) -> None:
        items = {item.args[1]: item for item in node.users if item in self.needed}
        results = tuple(self._range(items[i]) if i in items else None for i in range(3))
        self._attend(
            node,
            attention.AttentionBackwardFull,
            argument(node, "v"),
            ("do", "q", "k", "v"),
            results,
        )

    def _attend(
        self, node: fx.Node, kind: type[Layer], values: fx.Node, reads: tuple[str, ...], result: Any
    ) -> None:
        """values: the node that has as many coordinates as v."""
        bias = argument(node, "bias")
        sizes = {
            name: argument(node, name) for name in ("heads", "kv_heads", "scale", "softcap")
        } | {"bias": bias is not None}
        widths = {"queries": argument(node, "q"), "keys": argument(node, "k"), "values": values}
        sizes |= {name: _width(source) for name, source in widths.items()}
        ranges = [self._range(argument(node, name)) for name in reads]
        of_keys = None if bias is None else self._range(bias)
        self._write(
            node, kind, sizes, self.values[argument(node, "mask")], of_keys, *ranges, result
        )

    def loss_gradient(self, node: fx.Node) -> None:
        targets, mask = (self.values[argument(node, name)] for name in ("targets", "mask"))
        sizes = {"kind": argument(node, "kind")}
        self._write(
            node,
            embedding.LossGradient,
            sizes,
            targets,
            mask,
            self._range(argument(node, "logits")),
            self._range(node),
        )

    def mean_embedding_gradient(self, node: fx.Node) -> None:
        table, targets, mask = (
            self.values[argument(node, name)] for name in ("weight", "targets", "mask")
        )
        self._write(
            node, embedding.MeanEmbeddingGradient, {}, table, targets, mask, self._range(node)
        )


def _width(node: fx.Node) -> int:
    """Numbers in the last dimension."""
    width = info(node).shape[-1]
    assert isinstance(width, int)
    return width


def _norm_sizes(node: fx.Node) -> dict[str, Any]:
    """Of a norm's forward, backward or descent."""
    pieces, eps, kind = (argument(node, name) for name in ("heads", "eps", "kind"))
    return {"size": _width(argument(node, "x")), "pieces": pieces, "eps": eps, "kind": kind}


def _is_vector(tile: Tile) -> bool:
    """Whether one prefix token holds all rows of a single column: a gain, a shift, or the bias of a
    one-row tile.
    """
    return tile.tokens.size == 1 and tile.columns.size == tile.row_width == 1


def _place(tile: Tile) -> Place:
    return Place(tile.tokens.start, tile.tokens.stop, tile.coordinates.start, tile.coordinates.stop)
