"""The module that a user holds: a compiled simulator of one auxiliary model.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tintc.ir.builder import outputs
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError
from tintc.ir.inputs import CODE, is_table, is_wide_table
from tintc.ir.node_meta import info
from tintc.ir.ops.head import token_losses
from tintc.ir.precision import HALF
from tintc.ir.program import Program
from tintc.passes.optimize.chunk_head import chunk_head
from tintc.runtime import slices
from tintc.runtime.backends import fused
from tintc.runtime.backends.transformer import emit as transformer
from tintc.runtime.backends.transformer.pages import PrefixPages
from tintc.runtime.backends.transformer.structure import Structure, check_backend
from tintc.runtime.inputs import Inputs, check_tensor, check_updates, prepare
from tintc.runtime.labels import check_labels, kept_positions, language_loss, mean_loss
from tintc.runtime.outputs import SimulatorLosses, SimulatorOutput
from tintc.runtime.prefix import PrefixEmbeddings, put_rows
from tintc.runtime.slices import run_in_slices, slice_size
from tintc.runtime.specialize.optimize import optimize as optimized_graph
from tintc.runtime.specialize.programs import Programs


class Simulator(nn.Module):
    """Fine-tunes an auxiliary model on part of each sequence and predicts with the result, in one
    forward pass.

    backend: `fused` or `transformer`. prefix: the auxiliary weights, as they are
    (`PrefixEmbeddings`) or in pages of prefix tokens (`PrefixPages`). structure: the transformer's
    structural constants, parameters that need no gradient. share: who has one copy of them.
    optimize: whether the fused back end optimizes, or names of the optimizations that are on.
    torch_compile: mode of torch.compile, or None for plain torch. inner_lr: the inner learning
    rate.
    Weights and rate are parameters:
    an outer loss on the logits reaches them. Wrap calls in torch.inference_mode() when nothing is
    trained from
    outside: without it torch records the call for a backward pass through all steps, which costs
    memory.

    In float16 and bfloat16 the weights, products and updates are of that type (norm differences,
    softmax and losses run in float32); updates far below a weight's own precision are rounded away.
    The inner learning rate is float64 throughout.
    """

    def __init__(
        self,
        program: Program,
        tensors: dict[str, Tensor],
        *,
        backend: str = "fused",
        share: str = "none",
        optimize: bool | Collection[str] = True,
        torch_compile: str | None = None,
        source: dict[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        check_backend(backend, share)
        self.program = program
        self.backend, self.share = backend, share
        self.source = source or {}
        self.tokenizer = tokenizer
        device = next(iter(tensors.values())).device
        tensors = {**{name: table.to(device) for name, table in program.tables.items()}, **tensors}
        self.prefix: PrefixEmbeddings | PrefixPages
        self.structure: Structure | None = None
        if backend == "fused":
            self.prefix = PrefixEmbeddings(tensors)
        else:
            self.prefix = PrefixPages(program.layout, tensors, transformer.tables(program))
            self.structure = Structure(
                program.layout, share, program.facts.block_path, self.dtype, self.device
            )
            transformer.emit(program, self.structure, fused.OUTPUTS)  # makes every module once
        self.inner_lr = nn.Parameter(
            torch.tensor(program.config.inner_lr, dtype=torch.float64, device=self.device)
        )
        self._programs = Programs(program, self.structure, optimize, torch_compile)
        self._warned = False

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

    @property
    def config(self) -> SimulatorConfig:
        return self.program.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.prefix.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.prefix.parameters()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Simulator:
        # The rate stays in float64, whatever the weights are: 1e-4 has seven digits in float32 and
        # three in bfloat16.
        exact = self.inner_lr.detach().clone()
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

    def forward(
        self,
        input_ids: Tensor,
        train_mask: Tensor,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_initial: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> SimulatorOutput:
        """Logits of every sequence under the weights that its own training segment gave.

        input_ids: (B, T). train_mask: (B, T) of 0 and 1; position t carries loss iff train_mask[t +
        1] is 1; its target is token t + 1. loss_mask: (B, T), narrows the targets. attention_mask:
        (B, T) with 0 on padding, or (B, T, T); always combined with the causal mask. position_ids:
        (B, T); by default counted over tokens that are no padding.
        labels: (B, T) for the reported losses (mean, shifted by one, -100 ignored). return_initial:
        also compute logits before any update on all tokens; the training pass then runs on all
        tokens instead of the segment.

        logits_to_keep: logits of the last so many positions only, or of the positions in a tensor
        (K,); 0 for all. The others are then not computed; losses stay those of all labels. Who
        needs no logits at all calls `losses`.

        The loss whose gradient is followed is a sum over training positions, never a mean. A
        sequence without a target keeps its weights. Raises InputError for inputs that do not fit.
        Source: TINT.md sections 1 and 2.
        """
        check_tensor("train_mask", train_mask)
        inputs = self._prepare(
            input_ids, train_mask, loss_mask, attention_mask, position_ids, stacklevel=5
        )  # torch calls forward
        kept = kept_positions(logits_to_keep, input_ids.shape[1], self.device)
        segment = input_ids.shape[1] if return_initial else inputs.segment
        wanted: tuple[str, ...] = ("logits", "initial_logits") if return_initial else ("logits",)
        if labels is None:
            out = self._run(wanted, inputs, segment=segment, kept=kept)
            return SimulatorOutput(out["logits"], out.get("initial_logits"))
        labels = check_labels(labels, input_ids, self.program.facts.vocab_size).to(self.device)
        if kept is None:
            out = self._run(wanted, inputs, segment=segment)
            losses = {name: language_loss(out[name], labels) for name in wanted}
        else:
            out = self._run(
                (*wanted, *(name.replace("logits", "losses") for name in wanted)),
                inputs,
                segment=segment,
                kept=kept,
                labels=labels,
            )
            losses = {
                name: mean_loss(out[name.replace("logits", "losses")], labels) for name in wanted
            }
        return SimulatorOutput(
            out["logits"], out.get("initial_logits"), losses["logits"], losses.get("initial_logits")
        )

    def losses(
        self,
        input_ids: Tensor,
        train_mask: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_initial: bool = False,
    ) -> SimulatorLosses:
        """The losses of every token under the updated weights; under torch.inference_mode() without
        ever holding all logits.

        Arguments as in `forward`; labels as there. A memory of (B, T, V) numbers, which is often
        the largest, is never needed.
        """
        check_tensor("train_mask", train_mask)
        inputs = self._prepare(input_ids, train_mask, loss_mask, attention_mask, position_ids)
        labels = check_labels(labels, input_ids, self.program.facts.vocab_size).to(self.device)
        wanted = ("losses", "initial_losses") if return_initial else ("losses",)
        out = self._run(
            wanted,
            inputs,
            segment=input_ids.shape[1] if return_initial else inputs.segment,
            labels=labels,
        )
        return SimulatorLosses(**out, loss=mean_loss(out["losses"], labels))

    def updated_state_dict(
        self,
        input_ids: Tensor,
        train_mask: Tensor,
        index: int = 0,
        *,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The auxiliary model's whole state dict after the inner steps on sequence `index`; loads
        back into the model.

        Arguments as in `forward`. Tied names share one tensor. Raises InputError if there is no
        such sequence.
        """
        check_tensor("input_ids", input_ids)
        batch = len(input_ids) if input_ids.ndim else 0
        if not isinstance(index, int) or not -batch <= index < batch:
            raise InputError(f"index is {index!r}; the batch has {batch} sequences")
        for name, mask in (
            ("train_mask", train_mask),
            ("loss_mask", loss_mask),
            ("attention_mask", attention_mask),
        ):
            if isinstance(mask, Tensor) and (mask.ndim == 0 or len(mask) != batch):
                raise InputError(
                    f"{name} has shape {tuple(mask.shape)}; expected {batch} sequences, those of "
                    "input_ids"
                )
        row = slice(index % batch, index % batch + 1)
        parts = [
            None if x is None else x[row]
            for x in (input_ids, train_mask, loss_mask, attention_mask, position_ids)
        ]
        updates = self.updates(*parts)  # type: ignore[arg-type]
        slots = self.program.layout.prefix
        state = {
            name: tensor.detach().clone()
            for name, tensor in self.prefix.tensors().items()
            if not is_table(name)
        }
        for slot, value in updates.items():
            where = slots[slot]
            put_rows(state[where.parameter], where, value[0].detach())
        return state | {alias: state[name] for alias, name in self.program.aliases.items()}

    def updates(
        self,
        input_ids: Tensor,
        train_mask: Tensor,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Values of the updated prefix slots after the last step, one a sequence: (B, O, I) or (B,
        D).
        """
        check_tensor("train_mask", train_mask)
        inputs = self._prepare(input_ids, train_mask, loss_mask, attention_mask, position_ids)
        return dict(self._run(("updates",), inputs, segment=inputs.segment)["updates"])

    def predict(
        self,
        updates: dict[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """Logits (B, T, V), or those kept, of any sequences under the slot values that `updates`
        returned; nothing is trained.
        """
        inputs = self._prepare(input_ids, None, None, attention_mask, position_ids)
        check_updates(updates, outputs(self.program.graph)["updates"], len(input_ids), self.dtype)
        kept = kept_positions(logits_to_keep, input_ids.shape[1], self.device)
        out: Tensor = self._run(
            ("logits",), inputs, segment=inputs.segment, given=updates, kept=kept
        )["logits"]
        return out

    def predict_initial(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """Logits (B, T, V), or those kept, of the unmodified model. logits_to_keep: as in
        `forward`.
        """
        inputs = self._prepare(input_ids, None, None, attention_mask, position_ids)
        kept = kept_positions(logits_to_keep, input_ids.shape[1], self.device)
        out: Tensor = self._run(("initial_logits",), inputs, segment=input_ids.shape[1], kept=kept)[
            "initial_logits"
        ]
        return out

    def emitted(
        self,
        outputs: tuple[str, ...] = ("logits",),
        *,
        from_updates: bool = False,
        differentiable: bool = True,
    ) -> fx.GraphModule:
        """The program behind a call, for this simulator's dtype: plain torch, or a call of each
        module; `.code` reads as Python.

        differentiable: of a call with gradients on; else of one under torch.inference_mode(),
        without masks, of the shapes that costs are told for: which optimizations it has depends on
        them.
        """
        return self._programs.get(
            self._programs.usual(
                outputs, self._weight, from_updates=from_updates, differentiable=differentiable
            )
        ).module

    def optimized(
        self, outputs: tuple[str, ...] = ("logits",), *, differentiable: bool = False
    ) -> fx.Graph:
        """The graph of `tint` operators that such a program is emitted from. Raises UsageError for
        the transformer back end.
        """
        if self.structure is not None:
            raise UsageError(
                "the transformer back end runs the lowered graph as it is; expected the fused back "
                "end"
            )
        return optimized_graph(
            self.program, self._programs.usual(outputs, self._weight, differentiable=differentiable)
        )

    def _prepare(
        self,
        input_ids: Tensor,
        train_mask: Tensor | None,
        loss_mask: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        stacklevel: int = 3,
    ) -> Inputs:
        inputs = prepare(
            self.program.facts,
            self.dtype,
            self.device,
            input_ids,
            train_mask,
            loss_mask,
            attention_mask,
            position_ids,
        )
        if train_mask is not None and inputs.untrained and not self._warned:
            self._warned = True
            warnings.warn(
                f"{inputs.untrained} of {len(input_ids)} sequences have no training target: their "
                "logits are the unmodified model's "
                "(said once)",
                stacklevel=stacklevel,
            )
        return inputs

    def _run(
        self,
        outputs: tuple[str, ...],
        inputs: Inputs,
        *,
        segment: int,
        given: dict[str, Tensor] | None = None,
        kept: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Any]:
        tensors = (
            inputs.tensors
            if labels is None
            else {**inputs.tensors, "labels": F.pad(labels[:, 1:], (0, 1), value=-100)}
        )
        if self.structure is not None:
            return self._run_transformer(outputs, tensors, segment, given, kept)

        def run(tensors: dict[str, Tensor]) -> dict[str, Any]:
            more = {} if kept is None else {"kept": kept}
            module, arguments = self.bound(
                outputs, {**tensors, **more}, segment, given, causal=inputs.causal
            )
            return self._programs.runnable(module, self._differentiable)(*arguments)

        if (
            self._differentiable
            or slices.NAME not in self.optimizations
            or "updates" in outputs
            or given
        ):
            return run(tensors)
        batch, tokens = inputs.tensors["input_ids"].shape
        size = slice_size(batch, tokens, self.device.type)
        if size >= batch:
            return run(tensors)
        shape = (batch, tokens if kept is None else len(kept))
        room = (
            {name: self._room(name, shape) for name in outputs if "logits" in name}
            if chunk_head.name in self.optimizations
            else {}
        )
        into = {f"{name}_into": tensor for name, tensor in room.items()}
        return run_in_slices(run, {**tensors, **into}, batch, size, room)

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """For logits that are written slice by slice."""
        width = info(dict(outputs(self.program.graph))[name]).shape[-1]  # type: ignore[arg-type]
        return torch.empty((*shape, int(width)), dtype=self.dtype, device=self.device)

    def _run_transformer(
        self,
        outputs: tuple[str, ...],
        tensors: dict[str, Tensor],
        segment: int,
        given: dict[str, Tensor] | None,
        kept: Tensor | None,
    ) -> dict[str, Any]:
        """The paper's construction has a head for all tokens; what was asked for is taken from its
        logits.
        """
        plain = tuple(dict.fromkeys(name.replace("losses", "logits") for name in outputs))
        module, arguments = self.bound(plain, tensors, segment, given)
        result: dict[str, Any] = module(*arguments)
        losses = {
            name: token_losses(result[name.replace("losses", "logits")], tensors["labels"])
            for name in outputs
            if "losses" in name
        }
        if kept is not None:
            result = {name: value.index_select(1, kept) for name, value in result.items()}
        return {name: losses[name] if name in losses else result[name] for name in outputs}

    def bound(
        self,
        outputs: tuple[str, ...],
        inputs: dict[str, Tensor],
        segment: int,
        given: dict[str, Tensor] | None = None,
        *,
        causal: bool = False,
    ) -> tuple[fx.GraphModule, list[Any]]:
        """The emitted program and what one call passes to it: weights, inputs (by the names of
        INPUTS) and given slot values.
        causal: the attention mask among the inputs is the causal one."""
        facts = {
            "from_updates": given is not None,
            "differentiable": self._differentiable,
            "causal": causal,
            "some_tokens": "kept" in inputs,
            "into": any(name.endswith("_into") for name in inputs),
        }
        program = self._programs.get(
            self._programs.choose(outputs, self._weight, inputs, segment, **facts)
        )
        values: dict[str, Any] = {
            **inputs,
            "inner_lr": self.inner_lr,
            "segment": segment,
            **(given or {}),
        }
        if self.structure is not None and isinstance(self.prefix, PrefixPages):
            values |= {**self.prefix.by_name(), CODE: self.structure.code}
        weights = self.prefix.direct()
        values |= self._programs.folded(program, weights)
        return program.module, [
            weights[name] if is_weight else values[name] for is_weight, name in program.arguments
        ]

    @property
    def _differentiable(self) -> bool:
        """Whether someone may ask for gradients through a call now: grad mode is on and a parameter
        asks for it, or torch exports.
        """
        return torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        )

    @property
    def _weight(self) -> nn.Parameter:
        return next(self.prefix.parameters())
