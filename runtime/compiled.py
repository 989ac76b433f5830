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
from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.inputs import CODE, is_wide_table
from tintc.ir.node_meta import info
from tintc.ir.ops.head import token_losses
from tintc.ir.outputs import LOWERED, SLOTS, Output, without_losses
from tintc.ir.precision import HALF, wide_dtype
from tintc.ir.program import Program
from tintc.passes.optimize.chunk_head import chunk_head
from tintc.runtime import slices
from tintc.runtime.backends.transformer import emit as transformer
from tintc.runtime.backends.transformer.pages import PrefixPages
from tintc.runtime.backends.transformer.structure import Structure, check_backend
from tintc.runtime.call import Call, without_autocast
from tintc.runtime.prefix import PrefixEmbeddings
from tintc.runtime.slices import run_in_slices, slice_size
from tintc.runtime.specialize.cached_layers import Layer
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


class Compiled(nn.Module):
    """A program, its weights and what was emitted for them."""

    prefix: PrefixEmbeddings | PrefixPages  # the auxiliary weights, as they are or in pages
    structure: Structure | None  # the transformer's constants; they need no gradient
    inner_lr: nn.Parameter

    def __init__(
        self,
        program: Program,
        tensors: dict[str, Tensor],
        *,
        backend: str = "fused",
        share: str = "none",
        optimize: bool | Collection[str] = True,
        torch_compile: str | None = None,
    ) -> None:
        super().__init__()
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
        self._programs = Programs(program, self.structure, optimize, torch_compile)

    def _made_structure(self) -> Structure:
        """All structural constants, for the prefix as it is."""
        layout, blocks = self.program.layout, self.program.facts.block_path
        structure = Structure(layout, self.share, blocks, self.dtype, self.device)
        transformer.emit(self.program, structure, LOWERED)  # makes every module once
        return structure

    def __getstate__(self) -> dict[str, Any]:
        """What an artifact holds, and the settings of a module: constants and emitted programs are
        made again.
        """
        modules = {name: m for name, m in self._modules.items() if name != "structure"}
        settings = self._programs.enabled, self._programs.torch_compile
        return {**self.__dict__, "_modules": modules, "_programs": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.structure = None if self.backend == "fused" else self._made_structure()
        self._programs = Programs(self.program, self.structure, *state["_programs"])

    @property
    def config(self) -> SimulatorConfig:
        return self.program.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self._weight.dtype

    @property
    def own_dtype(self) -> torch.dtype:
        """Type of what sequences learn: at least float32, but in the transformer's pages."""
        return wide_dtype(self.dtype) if self.structure is None else self.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._weight.device

    def check_has_numbers(self) -> None:
        """Raises UsageError on the meta device, where weights have shapes alone."""
        if self.device.type == "meta":
            raise UsageError(
                "the simulator is on the meta device, where weights have no numbers; expected one "
                "with numbers: move it with to_empty(device=...) and load its state dict"
            )

    @property
    def optimizations(self) -> tuple[str, ...]:
        """Names of the optimizations of the fused back end that are on; set it to switch them. They
        change results by rounding only.
        """
        return self._programs.enabled if self.structure is None else ()

    @optimizations.setter
    def optimizations(self, names: bool | Collection[str]) -> None:
        self.optimize(names, self._programs.torch_compile)

    def optimize(
        self, names: bool | Collection[str] = True, torch_compile: str | None = None
    ) -> None:
        """Switches optimizations and torch.compile, as `tintc.compile` does. Raises UsageError for
        an unknown name or mode.
        """
        self._programs = Programs(self.program, self.structure, names, torch_compile)

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
        if self.structure is not None:
            raise UsageError(
                "the transformer back end runs the lowered graph as it is; expected the fused back "
                "end"
            )
        return optimized_graph(self.program, self._usual(outputs, differentiable=differentiable))

    def program_of(self, call: Call) -> Emitted:
        """The emitted program of a call."""
        kind = call.kind(differentiable=self._differentiable)
        chosen = self._programs.choose(kind, self._weight, call.shape[1], call.segment)
        return self._programs.get(chosen)

    def bound(self, call: Call) -> tuple[fx.GraphModule, list[Value]]:
        """The emitted program and what one call passes to it. The transformer back end knows no
        losses and no kept positions.
        """
        emitted = self.program_of(call)
        kept = {} if call.kept is None else {"kept": call.kept}
        values: dict[Source, Mapping[str, Value]] = {
            **self._weights_of(emitted),
            Source.PREFIX: self._pages(),
            Source.INPUT: {
                **call.tensors,
                **kept,
                "inner_lr": self._rate(call),
                "segment": call.segment,
            },
            Source.GIVEN: {**(call.given or {}), **(call.states or {}), **(call.cache or {})},
        }
        return emitted.module, emitted.bound(values)

    def bound_weights(
        self, call: Call
    ) -> tuple[Run, tuple[Argument, ...], dict[Source, Mapping[str, Value]]]:
        """(a call's program as it runs, its arguments, the weights among them), for many calls."""
        emitted = self.program_of(call)
        run = self._programs.runnable(emitted.module, self._differentiable)
        return run, emitted.arguments, self._weights_of(emitted)

    def _weights_of(self, emitted: Emitted) -> dict[Source, Mapping[str, Value]]:
        """As they are, and what they were turned into once."""
        weights = self.prefix.direct()
        return {Source.WEIGHT: weights, Source.FOLDED: self._programs.folded(emitted, weights)}

    def run(self, call: Call) -> dict[Output, Tensor]:
        """The outputs of a call that are tensors: all but updates."""
        if self.structure is not None:
            return self._run_transformer(call)
        size = self._slice_size(call)
        return self._run_whole(call) if size is None else self._run_slices(call, size)

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

    def _all_steps(self, call: Call) -> dict[str, Result]:
        """Of the first step what the call asks for, and slot values and states after the last. More
        steps than a graph holds are a loop over the program of one.
        """
        looped = self.config.looped
        factor = self.config.schedule_factor(0) if looped else call.lr_factor
        found = self._result(replace(call, lr_factor=factor))
        again = tuple(kind for kind in call.outputs if kind in SLOTS)
        for number in range(1, self.config.steps if looped and again else 1):
            given, states = found[Output.UPDATES], found[Output.STATES]
            assert isinstance(given, dict) and isinstance(states, dict)
            factor = self.config.schedule_factor(number)
            step = replace(call, outputs=again, given=given, states=states, lr_factor=factor)
            found |= self._result(replace(step, donated=True))  # the step before made them
        return found

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
        """All outputs of a call; of more steps than a graph holds, by a loop over one's program."""
        if not (self.config.looped and call.trains):
            return self._result(call)
        updates = self._all_steps(replace(call, outputs=SLOTS, kept=None))[Output.UPDATES]
        assert isinstance(updates, dict)
        rest = tuple(kind for kind in call.outputs if kind is not Output.UPDATES)
        found = self._result(replace(call, outputs=rest, given=updates)) if rest else {}
        return found | ({Output.UPDATES: updates} if Output.UPDATES in call.outputs else {})

    def _result(self, call: Call) -> dict[str, Result]:
        """Of one program."""
        with without_autocast(self.device.type):
            module, arguments = self.bound(call)
            return self._programs.runnable(module, self._differentiable)(*arguments)

    def _run_whole(self, call: Call) -> dict[Output, Tensor]:
        found = self._results(call)
        return {Output(k): value for k, value in found.items() if isinstance(value, Tensor)}

    def _slice_size(self, call: Call) -> int | None:
        """Sequences that run together; None for all."""
        if self._differentiable or slices.NAME not in self.optimizations or call.given:
            return None
        batch, tokens = call.shape
        size = slice_size(batch, tokens, self.device.type)
        return None if size >= batch else size

    def _run_slices(self, call: Call, size: int) -> dict[Output, Tensor]:
        room = self._room(call) if chunk_head.name in self.optimizations else {}
        tensors = {**call.tensors, **{kind.into: tensor for kind, tensor in room.items()}}

        def run(part: dict[str, Tensor]) -> dict[Output, Tensor]:
            return self._run_whole(replace(call, tensors=part))

        return run_in_slices(run, tensors, call.shape[0], size, room)

    def _room(self, call: Call) -> dict[Output, Tensor]:
        """For logits that are written slice by slice."""
        returned = lowered_outputs(self.program.graph)
        nodes = {
            Output.LOGITS: returned["logits"],
            Output.INITIAL_LOGITS: returned["initial_logits"],
        }
        batch, tokens = call.shape
        tokens = tokens if call.kept is None else len(call.kept)
        widths = {kind: int(info(nodes[kind]).shape[-1]) for kind in call.outputs if kind in nodes}
        return {
            kind: torch.empty(batch, tokens, width, dtype=self.dtype, device=self.device)
            for kind, width in widths.items()
        }

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
            elif call.kept is not None:
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
    def _differentiable(self) -> bool:
        """Whether someone may ask for gradients through a call now: grad mode is on and a parameter
        asks for it, or torch exports.
        """
        return torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What decoding keeps of earlier tokens, attention layer by layer."""
        return self._programs.layers

    def weight_states(self) -> list[WeightState]:
        """What changes when somebody writes to a weight, or moves or replaces it."""
        own = (*self.prefix.parameters(), *self.prefix.buffers())
        return [WeightState.of(weight) for weight in own]

    @property
    def _weight(self) -> nn.Parameter:
        """Any one of the weights."""
        return next(self.prefix.parameters())

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
