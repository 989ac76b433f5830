"""A lowered program with its weights, and how one call of it runs.

Legend: B sequences, T tokens, K kept positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from tintc.ir.builder import outputs as lowered_outputs
from tintc.ir.call_sizes import CallSizes, call_sizes
from tintc.ir.choices import Choices
from tintc.ir.errors import UsageError
from tintc.ir.inputs import CODE, is_wide_table
from tintc.ir.node_meta import info
from tintc.ir.ops.head import token_losses
from tintc.ir.outputs import LOWERED, SLOTS, Output, without_losses
from tintc.ir.precision import HALF
from tintc.ir.program import Program
from tintc.passes.optimize.chunk_head import chunk_head
from tintc.runtime import slices
from tintc.runtime.apart import last_of, training_of
from tintc.runtime.backends.transformer import emit as transformer
from tintc.runtime.backends.transformer.pages import PrefixPages
from tintc.runtime.backends.transformer.structure import Structure, check_backend
from tintc.runtime.calibration import wanted_calibration
from tintc.runtime.call import Call, without_autocast
from tintc.runtime.prefix import PrefixEmbeddings
from tintc.runtime.slices import Work, read_memory, run_in_slices, slice_size
from tintc.runtime.specialize.cached_layers import Layer
from tintc.runtime.specialize.chosen import chosen
from tintc.runtime.specialize.lifetimes import bytes_held
from tintc.runtime.specialize.optimize import optimize as optimized_graph
from tintc.runtime.specialize.programs import (
    Argument,
    Emitted,
    Programs,
    Result,
    Run,
    Source,
    Value,
    WeightState,
)
from tintc.runtime.steps import Results, all_steps
from tintc.runtime.switched import Switched, Switches


class Compiled(Switched):
    """A program, its weights and what was emitted for them."""

    def __init__(self, program: Program, tensors: dict[str, Tensor], switches: Switches) -> None:
        super().__init__()
        backend, share = switches.backend, switches.share
        check_backend(backend, share)
        self.program = program
        self.backend, self.share = backend, share
        device = next(iter(tensors.values())).device
        tensors = {**{name: table.to(device) for name, table in program.tables.items()}, **tensors}
        self.structure = None
        if backend == "fused":
            self.prefix = PrefixEmbeddings(tensors)
        else:
            self.prefix = PrefixPages(program.layout, tensors, transformer.tables(program))
            self.structure = self._made_structure()
        self.inner_lr = nn.Parameter(
            torch.tensor(program.config.inner_lr, dtype=torch.float64, device=self.device)
        )
        self._memory = read_memory(switches.memory)
        wanted = wanted_calibration(switches.calibration)
        optimize, mode = switches.optimize, switches.torch_compile
        self._programs = Programs(program, self.structure, optimize, mode, wanted)

    def _made_structure(self) -> Structure:
        """All structural constants, for the prefix as it is."""
        layout, facts = self.program.layout, self.program.facts
        structure = Structure(layout, self.share, facts, self.dtype, self.device)
        transformer.emit(self.program, structure, LOWERED)  # makes every module once
        return structure

    def __getstate__(self) -> dict[str, Any]:
        """What an artifact holds, and the settings of a module: constants and emitted programs are
        made again.
        """
        modules = {name: m for name, m in self._modules.items() if name != "structure"}
        programs = self._programs
        settings = programs.enabled, programs.torch_compile, programs.calibration
        return {**self.__dict__, "_modules": modules, "_programs": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.structure = None if self.backend == "fused" else self._made_structure()
        self._programs = Programs(self.program, self.structure, *state["_programs"])

    def emitted(
        self,
        outputs: Collection[str] = (Output.LOGITS,),
        *,
        from_updates: bool = False,
        differentiable: bool = True,
    ) -> fx.GraphModule:
        """The program behind a call: plain torch, or calls of modules; `.code` reads as Python.

        outputs: values of `Output`. differentiable: of a call with gradients on; else of one under
        torch.inference_mode(), without masks, of the shapes that costs are told for: which
        optimizations it has depends on them.
        """
        kind = self._usual(outputs, from_updates=from_updates, differentiable=differentiable)
        return self._programs.get(kind).module

    def optimized(
        self, outputs: Collection[str] = (Output.LOGITS,), *, differentiable: bool = False
    ) -> fx.Graph:
        """The graph of `tint` operators that such a program is emitted from. Raises UsageError for
        the transformer back end.
        """
        self._refuse_transformer()
        return optimized_graph(self.program, self._usual(outputs, differentiable=differentiable))

    def _refuse_transformer(self) -> None:
        if self.structure is not None:
            raise UsageError(
                "the transformer back end runs the lowered graph as it is; expected the fused back "
                "end"
            )

    def chosen(self, sizes: CallSizes | None = None) -> dict[str, Any]:
        """What was chosen for a call for logits of these sizes, or of those that costs are told
        for, without masks and under torch.inference_mode(): see `specialize/chosen.py`. Raises as
        `optimized`.
        """
        self._refuse_transformer()
        sizes, programs = sizes or call_sizes(self.program.facts), self._programs
        kind = Choices((Output.LOGITS,), differentiable=False, causal=True)
        together = self._together(kind, sizes)
        kind = programs.usual(kind, self._weight, {**sizes, "batch": together})
        graph = optimized_graph(self.program, kind)
        return chosen(graph, self.calibration, len(programs.uses), len(kind.low_rank), together)

    def program_of(self, call: Call) -> Emitted:
        """The emitted program of a call."""
        return self._programs.get(self._choices(call))

    def _choices(self, call: Call) -> Choices:
        """The kind of a call."""
        kind = call.kind(differentiable=self._differentiable)
        batch, tokens = call.shape
        return self._programs.choose(kind, self._weight, tokens, call.segment, batch)

    def bound(self, call: Call) -> tuple[fx.GraphModule, list[Value]]:
        """The emitted program and what one call passes to it. The transformer back end knows no
        losses and no kept positions.
        """
        emitted = self.program_of(call)
        values: dict[Source, Mapping[str, Value]] = {
            **self._weights_of(emitted),
            Source.PREFIX: self._pages(),
            Source.INPUT: {
                **call.tensors,
                **call.positions,
                "inner_lr": self._rate(call),
                "segment": call.segment,
            },
            Source.GIVEN: call.known,
        }
        return emitted.module, emitted.bound(values)

    def bound_weights(
        self, call: Call
    ) -> tuple[Run, tuple[Argument, ...], dict[Source, Mapping[str, Value]]]:
        """(a call's program as it runs, its arguments, the weights among them), for many calls."""
        emitted = self.program_of(call)
        run = self._programs.runnable(emitted.module, self._differentiable, self.device.type)
        return run, emitted.arguments, self._weights_of(emitted)

    def _weights_of(self, emitted: Emitted) -> dict[Source, Mapping[str, Value]]:
        """As they are, and what they were turned into once."""
        weights = self.prefix.direct()
        return {Source.WEIGHT: weights, Source.FOLDED: self._programs.folded(emitted, weights)}

    def run(self, call: Call) -> dict[Output, Tensor]:
        """The outputs of a call that are tensors: all but updates."""
        if self.structure is not None:
            return self._run_transformer(call)
        batch, size = call.shape[0], self.slice_size(call)
        return self._run_whole(call) if size == batch else self._run_slices(call, size)

    def run_updates(self, call: Call) -> dict[str, Tensor]:
        """The updates of a call that asks for nothing else: slot -> value."""
        return self._slots(call, Output.UPDATES)

    def run_window(self, call: Call) -> dict[str, Result]:
        """All outputs of a window of a stream: its losses; slot values and states after training.

        `call` has given values and states, and asks for SLOTS beside what it wants of the first
        forward pass; or it has none, and asks for nothing of a training pass.
        """
        if self.structure is not None:
            return self._window_of_transformer(call)
        return self._all_steps(call)

    def _window_of_transformer(self, call: Call) -> dict[str, Result]:
        """Its head makes logits of all tokens; losses are taken from these."""
        plain = replace(call, outputs=without_losses(call.outputs), kept=None)
        found = self._all_steps(plain)
        logits = found.pop(Output.INITIAL_LOGITS)
        assert isinstance(logits, Tensor) and call.kept is not None
        losses = token_losses(logits, call.tensors["labels"])
        return found | {Output.INITIAL_LOSSES: losses.index_select(1, call.kept)}

    def _all_steps(self, call: Call) -> Results:
        return all_steps(self._result, self.config, call, frozen=self.shares_frozen)

    @property
    def shares_frozen(self) -> bool:
        """Whether a loop over steps computes once what none of them changes."""
        return self._programs.shares_frozen

    def run_states(self, call: Call) -> dict[str, Tensor]:
        """The same of the inner rule's own slots, of a config whose steps the graph holds."""
        assert not self.config.looped, "a loop over steps keeps no state"
        return self._slots(call, Output.STATES)

    def _slots(self, call: Call, kind: Output) -> dict[str, Tensor]:
        values = self._results(call)[kind]
        assert isinstance(values, dict)
        return dict(values)

    def _rate(self, call: Call) -> Tensor:
        return self.inner_lr if call.lr_factor == 1 else self.inner_lr * call.lr_factor

    def _results(self, call: Call) -> dict[str, Result]:
        """All outputs of a call. More steps than a graph holds are a loop over one's program; where
        training and the whole text have lengths of their own, each is a program.
        """
        if not (self.program.apart and call.trains):
            return self._result(call)
        training = self.training_of(call)
        after = self._all_steps(training)
        last = last_of(call, training, after, self.program.facts)
        rest = {} if last is None else self._result(last)
        return rest | {kind: after[kind] for kind in SLOTS if kind in call.outputs}

    def training_of(self, call: Call) -> Call:
        """The training of a call that is a program of its own."""
        looped = self.config.looped
        handed = frozenset[str]() if looped else self._programs.handed_over(self._choices(call))
        return training_of(call, handed, looped=looped)

    def _result(self, call: Call) -> dict[str, Result]:
        """Of one program."""
        with without_autocast(self.device.type):
            module, arguments = self.bound(call)
            run = self._programs.runnable(module, self._differentiable, self.device.type)
            return run(*arguments)

    def _run_whole(self, call: Call) -> dict[Output, Tensor]:
        found = self._results(call)
        return {Output(k): value for k, value in found.items() if isinstance(value, Tensor)}

    def slice_size(self, call: Call) -> int:
        """Sequences of a call that run together. Raises MemoryLimitError where one holds more than
        the memory that was set.
        """
        if self._differentiable or call.given:
            return call.shape[0]
        return self._together(*self._kind_and_sizes(call))

    def _kind_and_sizes(self, call: Call) -> tuple[Choices, CallSizes]:
        """Of a call that may run in slices."""
        batch, tokens = call.shape
        kind = replace(call.kind(differentiable=False), into=bool(self._written(call)))
        return kind, {"batch": batch, "tokens": tokens, "segment": call.segment}

    def _together(self, kind: Choices, sizes: CallSizes) -> int:
        """Sequences of a slice of such a call."""
        if slices.NAME not in self.optimizations:
            return sizes["batch"]
        widths, held = self._programs.widths, self._held(kind, sizes)
        trained = self.program.layout.updated_numbers * self.dtype.itemsize
        work = Work(sizes["tokens"], sizes["segment"], self.config.steps, widths, held, trained)
        return slice_size(sizes["batch"], work, self.calibration, self._memory)

    def _held(self, kind: Choices, sizes: CallSizes) -> Callable[[int], int]:
        """How many bytes the program holds that runs so many sequences of such a call: results of
        a slice are written into the whole.
        """
        tokens, segment, programs = sizes["tokens"], sizes["segment"], self._programs

        def held(sequences: int) -> int:
            of_a_slice = replace(kind, into=kind.into and sequences < sizes["batch"])
            known = programs.usual(of_a_slice, self._weight, {**sizes, "batch": sequences})
            counts = {"B": sequences, "T": tokens, "S": segment}
            return bytes_held(programs.get(known).values, counts, known.dtype.itemsize)

        return held

    def _run_slices(self, call: Call, size: int) -> dict[Output, Tensor]:
        returned = lowered_outputs(self.program.graph)
        nodes = {
            Output.LOGITS: returned["logits"],
            Output.INITIAL_LOGITS: returned["initial_logits"],
        }
        batch, tokens = call.shape
        tokens = tokens if call.kept is None else len(call.kept)
        widths = {kind: int(info(nodes[kind]).shape[-1]) for kind in self._written(call)}
        room = {
            kind: torch.empty(batch, tokens, width, dtype=self.dtype, device=self.device)
            for kind, width in widths.items()
        }
        tensors = {**call.tensors, **{kind.into: tensor for kind, tensor in room.items()}}

        def run(part: dict[str, Tensor]) -> dict[Output, Tensor]:
            return self._run_whole(replace(call, tensors=part))

        held = self._held(*self._kind_and_sizes(call))(size)
        return run_in_slices(run, tensors, batch, size, room, held)

    def _written(self, call: Call) -> list[Output]:
        """Logits that are written slice by slice."""
        whole = (Output.LOGITS, Output.INITIAL_LOGITS)
        on = chunk_head.name in self.optimizations
        return [kind for kind in call.outputs if on and kind in whole]

    def _run_transformer(self, call: Call) -> dict[Output, Tensor]:
        """The paper's construction has a head for all tokens; what was asked for is taken from its
        logits.
        """
        plain = replace(call, outputs=without_losses(call.outputs), kept=None)
        logits = self._run_whole(plain)
        found: dict[Output, Tensor] = {}
        for kind in call.outputs:
            value = logits[kind.logits]
            if kind.of_losses:
                value = token_losses(value, call.tensors["labels"])
            if call.kept is not None and (call.some_losses or not kind.of_losses):
                value = value.index_select(1, call.kept)
            found[kind] = value
        return found

    def _usual(
        self, outputs: Collection[str], *, from_updates: bool = False, differentiable: bool
    ) -> Choices:
        """The kind of a call without masks."""
        kind = Choices(
            tuple(map(Output, outputs)),
            from_updates=from_updates,
            differentiable=differentiable,
            causal=not differentiable,
        )
        return self._programs.usual(kind, self._weight)

    def _pages(self) -> dict[str, Tensor]:
        """Pages and position code of the transformer back end."""
        if self.structure is None or not isinstance(self.prefix, PrefixPages):
            return {}
        return {**self.prefix.by_name(), CODE: self.structure.code}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What decoding keeps of earlier tokens, attention layer by layer."""
        return self._programs.layers

    def weight_states(self) -> list[WeightState]:
        """What changes when somebody writes to a weight, or moves or replaces it."""
        own = (*self.prefix.parameters(), *self.prefix.buffers())
        return [WeightState.of(weight) for weight in own]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The rate stays in float64, whatever the weights are: 1e-4 has seven digits in float32 and
        # three in bfloat16.
        exact = self.inner_lr.detach().clone()
        if exact.is_meta:  # `to_empty` brings it back
            exact = torch.tensor(self.config.inner_lr, dtype=torch.float64)
        wide = {
            name: table.clone()
            for name, table in self.prefix.tensors().items()
            if is_wide_table(name)
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inner_lr.data = exact.to(self.inner_lr.device)
        for name, table in self.prefix.tensors().items():
            if name in wide and table.dtype in HALF:
                table.data = wide[name].to(table.device, torch.float32)
        return self
