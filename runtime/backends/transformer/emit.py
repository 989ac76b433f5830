"""The transformer back end: lowers `tint` operators to a transformer over prefix and input tokens
(TINT.md section 3).

Each operator becomes one module of `modules/` for each tile of the weight that it reads, by its
rule in `rules/`. Weights reach the residual stream through pages of prefix tokens alone, and
nothing else is carried from module to module. The result is a torch.fx graph of module calls:
`program.code` reads as the list of layers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from tintc.ir.builder import ancestors, input_node
from tintc.ir.builder import outputs as named_outputs
from tintc.ir.dialect import is_tint
from tintc.ir.errors import CompilerBug
from tintc.ir.inputs import CODE
from tintc.ir.node_meta import copy_info, info, note_origin
from tintc.ir.ops.linear import prefix
from tintc.ir.outputs import SLOTS, Output
from tintc.ir.program import Program
from tintc.runtime.backends.transformer.emitter import Emitter
from tintc.runtime.backends.transformer.modules.parts import blank, copied
from tintc.runtime.backends.transformer.pages import FillTile, ReadSlot
from tintc.runtime.backends.transformer.rules import RULES
from tintc.runtime.backends.transformer.structure import Structure, unused_name

_RESULTS = (Output.LOGITS.value, Output.INITIAL_LOGITS.value)


def emit(
    program: Program,
    structure: Structure,
    outputs: Sequence[str],
    *,
    given: Mapping[str, fx.Node] = MappingProxyType({}),
) -> fx.GraphModule:
    """A module that computes some of the program's outputs, as a dict, from inputs, tables, pages
    (`page_0`, ...) and the position code, passed by name.

    given: slot -> the node whose value is an input too, by the node's name: slots before a step, or
    updated ones, and then nothing is trained.
    """
    return _Walk(program, structure, outputs, given).run()


def tables(program: Program) -> list[str]:
    """Auxiliary parameters that operators read directly, not through a prefix slot: embeddings and
    the head.
    """
    reads = (
        n
        for node in program.graph.nodes
        if node.op == "call_function" and not is_tint(node, prefix)
        for n in node.all_input_nodes
    )
    return list(dict.fromkeys(name for n in reads if (name := info(n).parameter) is not None))


class _Walk:
    """Walks the lowered graph once."""

    def __init__(
        self,
        program: Program,
        structure: Structure,
        outputs: Sequence[str],
        given: Mapping[str, fx.Node],
    ) -> None:
        self.lowered, self.layout, self.structure = program.graph, program.layout, structure
        returned = named_outputs(program.graph)
        self.wanted: dict[str, Any] = {
            name: value for name, value in returned.items() if name in outputs
        }
        self.given, self.outputs = given, outputs
        self.filled: dict[fx.Node, tuple[str, fx.Node]] = {}  # of `given`: slot and placeholder
        roots: list[fx.Node] = []
        fx.node.map_arg(self.wanted, roots.append)
        self.needed = ancestors(roots, stop=set(self.given.values()))
        self.emitter = Emitter(program, structure, self.needed)
        # Between slot values and pages; no parts of the transformer.
        self.adapters: dict[str, nn.Module] = {}

    def run(self) -> fx.GraphModule:
        emitter, prompt = self.emitter, input_node(self.lowered, "input_ids")
        self._placeholders(prompt)
        emitter.stream = emitter.function(
            blank, emitter.values[prompt], emitter.code, self.layout.memory_width, name="stream"
        )
        computed = self.needed - set(self.given.values())
        for node in self.lowered.nodes:
            last = next(iter(reversed(emitter.graph.nodes)))
            if node in self.filled:
                self._fill(node)
            elif node in computed and node.op == "call_function":
                self._lower(node)
            note_origin(emitter.graph, last, node)
        emitter.graph.output(self._results())
        root = nn.Module()
        for node in emitter.graph.nodes:
            if node.op == "call_module" and node.target not in root._modules:
                root.add_module(
                    node.target,
                    self.adapters.get(node.target) or self.structure.layers[node.target],
                )
        return fx.GraphModule(root, emitter.graph, class_name="TransformerProgram")

    def _placeholders(self, prompt: fx.Node) -> None:
        """Inputs and tables, the position code, pages, and slot values where they are given."""
        emitter = self.emitter
        slots = self.layout.prefix
        placed = {name for node in self.needed if (name := info(node).slot) in slots}
        placed |= {slots[name].beside for name in placed if slots[name].beside}
        read_directly = {
            n for user in self.needed if not is_tint(user, prefix) for n in user.all_input_nodes
        }
        for node in self.lowered.nodes:
            if node.op == "placeholder" and (node in read_directly or node is prompt):
                emitter.values[node] = emitter.graph.placeholder(node.name)
                copy_info(node, emitter.values[node])
        emitter.code = emitter.graph.placeholder(CODE)
        for index in sorted({tile.page for name in placed for tile in slots[name].tiles}):
            emitter.pages[index] = emitter.graph.placeholder(f"page_{index}")
        emitter.first_pages = dict(emitter.pages)
        self.filled = {
            node: (slot, emitter.graph.placeholder(node.name)) for slot, node in self.given.items()
        }

    def _fill(self, node: fx.Node) -> None:
        """Puts a given value into its pages, where the graph makes it: what reads the slot before
        reads what the pages held.
        """
        emitter, (slot, value) = self.emitter, self.filled[node]
        if slot not in self.layout.prefix:  # how many steps there were is a number a sequence
            emitter.values[node] = value
            return
        emitter.hold(node)
        for index, tile in enumerate(self.layout.prefix[slot].tiles):
            name, page = f"fill_{node.name}_tile_{index}", emitter.pages[tile.page]
            emitter.pages[tile.page] = self._adapt(name, FillTile(tile), page, value)

    def _lower(self, node: fx.Node) -> None:
        rule = RULES.of(node)
        if rule is not None:
            rule(self.emitter, node)
        elif node.target is not operator.getitem:  # its operator has written it
            raise CompilerBug(f"{node.name} calls {node.target}, which has no transformer rule")
        for key in _RESULTS:  # taken out at once: later modules use these coordinates again
            if self.wanted.get(key) is node:
                self.emitter.values[node] = self.emitter.function(
                    copied, self.emitter.stream, self.emitter.range(node), name=key
                )

    def _results(self) -> dict[str, Any]:
        """The outputs by name; updated slots are read back from their pages."""
        found: dict[str, Any] = {
            name: self.emitter.values[node]
            for name, node in self.wanted.items()
            if name not in SLOTS
        }
        for kind in SLOTS:
            if kind in self.outputs:
                values = self.wanted.get(kind, {}).items()
                found[kind.value] = {slot: self._slot_value(slot, node) for slot, node in values}
        return found

    def _slot_value(self, slot: str, node: fx.Node) -> fx.Node:
        if slot not in self.layout.prefix:
            found: fx.Node = self.emitter.values[node]
            return found
        self.emitter.check_held(slot, node)
        reader = ReadSlot(self.layout.prefix[slot])
        pages = (self.emitter.pages[number] for number in reader.numbers)
        return self._adapt(f"read_{node.name}", reader, *pages)

    def _adapt(self, name: str, adapter: nn.Module, *args: fx.Node) -> fx.Node:
        name = unused_name(name, {*self.adapters, *self.structure.layers})
        self.adapters[name] = adapter
        return self.emitter.graph.create_node("call_module", name, args, name=name)
