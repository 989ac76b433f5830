"""Programs that a simulator has emitted so far, one for each kind of call, and how a kind is chosen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from tintc.compiler.builder import outputs
from tintc.compiler.choices import Choices
from tintc.compiler.cost_model import SlotUse, slot_uses
from tintc.compiler.node_meta import info
from tintc.compiler.optimize import check_names, optimize
from tintc.compiler.program import Program
from tintc.runtime import fused, transformer
from tintc.runtime.structure import Structure


@dataclass(frozen=True)
class Emitted:
    """A program, and for each of its arguments the name of the auxiliary parameter or, if it is none, of the input, or of the slot whose
    value is given."""

    module: fx.GraphModule
    arguments: list[tuple[bool, str]]


class Programs:
    """Emits a program at the first call of its kind and keeps it. enabled: names of the optimizations that are on."""

    def __init__(self, program: Program, structure: Structure | None, optimize: bool | Collection[str]) -> None:
        self.program, self.structure = program, structure
        self.enabled = check_names(optimize)
        self._emitted: dict[Choices, Emitted] = {}
        self._uses: dict[str, SlotUse] | None = None

    def choose(self, wanted: tuple[str, ...], weights: Tensor, inputs: dict[str, Tensor], segment: int, **facts: Any) -> Choices:
        """The kind of a call. weights: any one of them. facts: `from_updates`, `differentiable` and `causal` of Choices."""
        if self.structure is not None:
            return Choices(wanted, from_updates=facts.get("from_updates", False), dtype=weights.dtype)
        low_rank: frozenset[str] = frozenset()
        if "low_rank_updates" in self.enabled and "updates" not in wanted:
            if self._uses is None:
                self._uses = slot_uses(self.program.graph)
            shape = (inputs["input_ids"].shape[1], segment, weights.element_size(), weights.device.type)
            low_rank = frozenset(slot for slot, use in self._uses.items() if use.factors_win(*shape))
        return Choices(wanted, dtype=weights.dtype, device=weights.device.type, enabled=frozenset(self.enabled), low_rank=low_rank, **facts)

    def get(self, choices: Choices) -> Emitted:
        """The program of a kind of call."""
        if choices not in self._emitted:
            if self.structure is None:
                graph = optimize(self.program, choices)
                module = fused.emit(graph, choices.dtype)
                given = {node.name: slot for node in graph.nodes if node.op == "placeholder" and (slot := info(node).slot)}
            else:
                module = transformer.emit(self.program, self.structure, choices.outputs, from_updates=choices.from_updates)
                given = {node.name: slot for slot, node in outputs(self.program.graph)["updates"].items()}
            parameters = {node.name: name for node in self.program.graph.nodes if (name := info(node).parameter)}
            names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
            arguments = [(name in parameters, parameters.get(name) or given.get(name, name)) for name in names]
            self._emitted[choices] = Emitted(module, arguments)
        return self._emitted[choices]
