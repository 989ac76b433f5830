"""Programs that a simulator has emitted so far, one for each kind of call, and how a kind is
chosen.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, fx

from tintc.ir.builder import before_step, outputs
from tintc.ir.calibration import Calibration, fixed
from tintc.ir.call_sizes import CallSizes, call_sizes
from tintc.ir.choices import Choices
from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import UsageError
from tintc.ir.inputs import CODE
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward
from tintc.ir.outputs import SLOTS
from tintc.ir.precision import computed_dtype, wide_dtype
from tintc.ir.program import Program
from tintc.passes.analysis.factored import factorable
from tintc.runtime.backends import fused
from tintc.runtime.backends.transformer import emit as transformer
from tintc.runtime.backends.transformer.structure import Structure
from tintc.runtime.calibration import OFF, speed_of
from tintc.runtime.compilers import check_compiler
from tintc.runtime.specialize import frozen
from tintc.runtime.specialize.cached_layers import Layer, cached_layers
from tintc.runtime.specialize.cost_model import SlotUse, slot_uses
from tintc.runtime.specialize.folding import fold_weights
from tintc.runtime.specialize.lifetimes import Lifetime, lifetimes
from tintc.runtime.specialize.optimize import check_names, optimize
from tintc.runtime.specialize.written_over import written_over

# of torch.compile; the second replays CUDA graphs
MODES = ("default", "reduce-overhead", "max-autotune")

Value = Tensor | int  # of an argument; the segment's length is a number
Result = Tensor | dict[str, Tensor]  # of an output; updates are one tensor a slot
Run = Callable[..., dict[str, Result]]


class Source(Enum):
    """Where the value of an argument comes from, and what its name means."""

    WEIGHT = auto()  # an auxiliary parameter, by its own name
    PREFIX = auto()  # `page_0`, ... or the position code, of the transformer back end
    INPUT = auto()  # one of INPUTS and FURTHER_INPUTS
    GIVEN = auto()  # the updated value of a slot, by the slot's name
    FOLDED = auto()  # what weights were turned into once, by the folded node's name


class Argument(NamedTuple):
    """One argument of an emitted program."""

    source: Source
    name: str


@dataclass(frozen=True)
class Emitted:
    """A program and its arguments, in order. folded: makes what its weights have to be turned into,
    once. values: what it holds, and how long.
    """

    module: fx.GraphModule
    arguments: tuple[Argument, ...]
    folded: Emitted | None = None
    values: tuple[Lifetime, ...] = ()

    def bound(self, values: Mapping[Source, Mapping[str, Value]]) -> list[Value]:
        """The value of each argument."""
        return [values[source][name] for source, name in self.arguments]


class WeightState(NamedTuple):
    """What changes when somebody writes to a weight or replaces it."""

    storage: int
    offset: int  # in it
    version: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> WeightState:
        version = 0 if weight.is_inference() else weight._version
        storage = weight.untyped_storage()._cdata  # tensors without numbers have no address
        return cls(storage, int(weight.storage_offset()), version, weight.dtype)


@dataclass(frozen=True)
class _Folded:
    """What weights were turned into, and the state that they were in."""

    states: list[WeightState]
    value: Tensor


class Programs:
    """Emits a program at the first call of its kind and keeps it. enabled: names of the
    optimizations that are on. torch_compile: mode of torch.compile for programs that nobody
    differentiates. calibration: what optimizations choose by, None for the machine's own. Threads
    may share it: what is made once is made under a lock."""

    def __init__(
        self,
        program: Program,
        structure: Structure | None,
        optimize: bool | Collection[str],
        torch_compile: str | None = None,
        calibration: Calibration | None = OFF,
    ) -> None:
        self.program, self.structure = program, structure
        self.enabled = check_names(optimize)
        self.torch_compile = torch_compile
        self.calibration = calibration
        if torch_compile is not None and (torch_compile not in MODES or structure is not None):
            raise UsageError(
                f"torch_compile is {torch_compile!r}; expected {', '.join(MODES)}, and the "
                "fused back end"
            )
        self._lock = threading.RLock()
        self._compiled: dict[fx.GraphModule, Run] = {}
        self._emitted: dict[Choices, Emitted] = {}
        self._uses: dict[str, SlotUse] | None = None
        self._widths: tuple[tuple[int, int], ...] | None = None
        self._folded: dict[str, _Folded] = {}  # by the folded node's name
        self._layers: tuple[Layer, ...] | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What decoding keeps of earlier tokens; found once."""
        with self._lock:
            if self._layers is None:
                self._layers = cached_layers(self.program)
            return self._layers

    @cached_property
    def factorable(self) -> frozenset[str]:
        """Slots whose updates can leave a program as factors."""
        return frozenset(factorable(self.program.graph))

    def handed_over(self, chosen: Choices) -> frozenset[str]:
        """Slots whose updates pass from one program to the next as factors, where one program for
        both would hold them so.
        """
        return chosen.low_rank & self.factorable if chosen.low_rank else frozenset()

    @cached_property
    def shares_frozen(self) -> bool:
        """Whether it is on, and there is something to share."""
        if frozen.NAME not in self.enabled or self.structure is not None:
            return False
        return self.program.config.looped and bool(frozen.frozen_names(self.program.graph))

    def choose(
        self, kind: Choices, weight: Tensor, tokens: int, segment: int, batch: int = 1
    ) -> Choices:
        """The kind of a call, completed. weight: any one of them. tokens, segment: of a sequence,
        and those of them that training passes see. batch: sequences that run together.
        """
        if self.structure is not None:
            return replace(
                Choices(kind.outputs, dtype=weight.dtype, stored=weight.dtype),
                from_updates=kind.from_updates,
                from_states=kind.from_states,
            )
        speed = self.speed(weight)
        # Sizes are symbols while torch traces, and most machines have one kernel for all of them.
        asks = speed.one_kernel is None and not torch.compiler.is_compiling()
        sizes = {"B": batch, "T": tokens, "S": max(segment, 1)} if asks else {}
        return replace(
            kind,
            dtype=computed_dtype(weight.dtype, weight.device.type),
            stored=weight.dtype,
            device=weight.device.type,
            enabled=frozenset(self.enabled),
            calibration=speed,
            sizes=tuple((name, 2 ** round(math.log2(size))) for name, size in sizes.items()),
            low_rank=self._low_rank(kind, weight, tokens, segment, speed),
        )

    def speed(self, weight: Tensor) -> Calibration:
        """How fast the machine is, as far as anybody asks."""
        if not self.enabled:
            return fixed(weight.device.type)
        return speed_of(weight, self.calibration)

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Inner size and columns of the products that all sequences share."""
        with self._lock:
            if self._widths is None:
                found = (
                    info(argument(node, "weight")).shape
                    for node in self.program.graph.nodes
                    if is_tint(node, linear_forward)
                )
                self._widths = tuple(
                    (int(shape[1]), int(shape[0])) for shape in found if len(shape) == 2
                )
            return self._widths

    def _low_rank(
        self, kind: Choices, weight: Tensor, tokens: int, segment: int, speed: Calibration
    ) -> frozenset[str]:
        """Slots whose updates stay factors. While torch traces, sizes are symbols, and nothing may
        depend on them.
        """
        if kind.factored:
            return kind.factored
        trains = not kind.from_updates and not set(SLOTS) & set(kind.outputs)
        wanted = "low_rank_updates" in self.enabled and trains
        if not wanted or torch.compiler.is_compiling():
            return frozenset()
        shape = (tokens, segment, wide_dtype(weight.dtype).itemsize, speed)
        return frozenset(slot for slot, use in self.uses.items() if use.factors_win(*shape))

    def usual(self, kind: Choices, weight: Tensor, sizes: CallSizes | None = None) -> Choices:
        """The kind of a call of these sizes, or of those that costs are told for."""
        sizes = sizes or call_sizes(self.program.facts)
        return self.choose(kind, weight, sizes["tokens"], sizes["segment"], sizes["batch"])

    @property
    def uses(self) -> dict[str, SlotUse]:
        """Of the weights whose updates can stay factors."""
        with self._lock:
            if self._uses is None:
                self._uses = slot_uses(self.program.graph)
            return self._uses

    def get(self, choices: Choices) -> Emitted:
        """The program of a kind of call."""
        with self._lock:
            if choices not in self._emitted:
                self._emitted[choices] = (
                    self._emit_fused(choices)
                    if self.structure is None
                    else self._emit_transformer(choices, self.structure)
                )
            return self._emitted[choices]

    def runnable(self, module: fx.GraphModule, differentiable: bool, device: str) -> Run:
        """The program as it runs: itself, or compiled by torch. Raises UsageError where torch
        cannot compile.
        """
        if self.torch_compile is None or differentiable:
            return module
        with self._lock:
            if module not in self._compiled:
                check_compiler(device)
                self._compiled[module] = torch.compile(module, mode=self.torch_compile)
            return self._compiled[module]

    def _emit_fused(self, choices: Choices) -> Emitted:
        graph = optimize(self.program, choices)
        weights = None if choices.differentiable else fold_weights(graph)
        folded = None
        sources = {
            node.name: Argument(Source.GIVEN, slot)
            for node in graph.find_nodes(op="placeholder")
            if (slot := info(node).slot) is not None
        }
        if weights is not None:
            folded = _emitted(fused.emit(weights, choices.stored, choices.stored), self._weights())
            sources |= {name: Argument(Source.FOLDED, name) for name in _returned(folded)}
        over = frozenset[fx.Node]() if self.torch_compile else written_over(graph, choices)
        module = fused.emit(graph, choices.dtype, choices.stored, over)
        made = _emitted(module, sources | self._weights(), folded)
        return replace(made, values=lifetimes(graph, over))

    def _emit_transformer(self, choices: Choices, structure: Structure) -> Emitted:
        given = _given(self.program.graph, choices)
        module = transformer.emit(self.program, structure, choices.outputs, given=given)
        sources = {node.name: Argument(Source.GIVEN, slot) for slot, node in given.items()}
        prefix = (CODE, *(f"page_{index}" for index in range(self.program.layout.pages)))
        sources |= {name: Argument(Source.PREFIX, name) for name in prefix}
        return _emitted(module, sources | self._weights())

    def _weights(self) -> dict[str, Argument]:
        """Placeholder -> the auxiliary parameter that it stands for."""
        return {
            node.name: Argument(Source.WEIGHT, name)
            for node in self.program.graph.find_nodes(op="placeholder")
            if (name := info(node).parameter) is not None
        }

    @torch.no_grad()
    def folded(self, emitted: Emitted, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a program's weights are turned into: made at first use, and again when a weight has
        changed.
        """
        making = emitted.folded
        if making is None:
            return {}
        states = [WeightState.of(weights[argument.name]) for argument in making.arguments]
        names = _returned(making)
        with self._lock:
            known = [self._folded.get(name) for name in names]
            if any(each is None or each.states != states for each in known):
                values: dict[str, Tensor] = making.module(*making.bound({Source.WEIGHT: weights}))
                self._folded |= {name: _Folded(states, value) for name, value in values.items()}
            return {name: self._folded[name].value for name in names}


def _given(graph: fx.Graph, choices: Choices) -> dict[str, fx.Node]:
    """Slot -> the node whose value is an input of the program."""
    if choices.from_states:
        return before_step(graph)
    return outputs(graph)["updates"] if choices.from_updates else {}


def _emitted(
    module: fx.GraphModule, sources: Mapping[str, Argument], folded: Emitted | None = None
) -> Emitted:
    """sources: of the placeholders that are no inputs."""
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    arguments = tuple(sources.get(name, Argument(Source.INPUT, name)) for name in names)
    return Emitted(module, arguments, folded)


def _returned(emitted: Emitted) -> tuple[str, ...]:
    """Names of what a program returns."""
    found: Mapping[str, object] = emitted.module.graph.output_node().args[0]  # type: ignore[assignment]
    return tuple(found)
