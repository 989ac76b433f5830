"""The module that a user holds: a compiled simulator of one auxiliary model.

Every call builds one `Batch` at the door; inside, only that travels. Legend: B sequences, T tokens,
K kept positions, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.builder import outputs
from tintc.ir.call_sizes import Predict
from tintc.ir.outputs import Output
from tintc.ir.program import Program
from tintc.passes.optimize.whole_initial import whole_initial
from tintc.runtime.adapted import Adapted
from tintc.runtime.batch import Batch
from tintc.runtime.calibration import Wanted
from tintc.runtime.call import Call
from tintc.runtime.compiled import Compiled
from tintc.runtime.decoding.form import Form, factored_slots
from tintc.runtime.decoding.program import Updates
from tintc.runtime.description import as_html, as_text, describe, graph_of_phases
from tintc.runtime.inputs import Inputs, check_tensor, check_updates, placed, prepare
from tintc.runtime.labels import (
    check_labels,
    kept_positions,
    labelled_positions,
    labels_of_rest,
    language_loss,
    mean_loss,
    predicted_positions,
)
from tintc.runtime.outputs import SimulatorLosses, SimulatorOutput
from tintc.runtime.reading import Progress
from tintc.runtime.scoring import StreamOutput, score_documents
from tintc.runtime.showing.of_outputs import Asked
from tintc.runtime.stream_settings import Keys, Reset, StreamSettings
from tintc.runtime.streaming import Stream
from tintc.runtime.switched import Switches


class Simulator(Compiled):
    """Fine-tunes an auxiliary model on part of each sequence and predicts with the result, in one
    forward pass.

    backend: `fused` or `transformer`. prefix: the auxiliary weights, as they are
    (`PrefixEmbeddings`) or in pages of prefix tokens (`PrefixPages`). structure: the transformer's
    structural constants, parameters that need no gradient. share: who has one copy of them.
    optimize: whether the fused back end optimizes, or names of the optimizations that are on.
    torch_compile: mode of torch.compile, or None for plain torch. inner_lr: the inner learning
    rate.
    memory: how many sequences run together: `auto` as many as the products need for their speed and
    as fit into what is free, `lowest` one at a time, bytes (or text as 2GB) at most what holds so
    many in activations, by an estimate. calibration: what optimizations choose by: `auto` what this
    machine was measured to do, `off` fixed choices, or a file of `tintc env --calibrate`.
    Weights and rate are parameters: an outer loss on the logits reaches them. Wrap calls in
    torch.inference_mode() when nothing is trained from outside: without it torch records the call
    for a backward pass through all steps, which costs memory.

    In float16 and bfloat16 the weights are of that type, and so are logits and what is cached; what
    sequences learn, own weights, states and rates, is in float32, in which a small step is not
    rounded away. On a CPU all is computed in float32, a weight converted where it is read. On
    other devices products take half-precision factors and those that read what was learned are
    summed in float32 (norm differences, softmax and losses run in float32 anyway).
    The inner learning rate is float64 throughout. torch.autocast changes nothing in a call: finite
    differences are written for the type of the weights; `simulator.bfloat16()` is another one.

    On the meta device calls give shapes. Pickles and torch.save hold what an artifact does; load
    only those that you trust: unlike an artifact's, their loading runs code.
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
        memory: str | int = "auto",
        calibration: Wanted = "auto",
        source: dict[str, Any] | None = None,
        tokenizer: Any = None,
        statistics: dict[str, Any] | None = None,
    ) -> None:
        switches = Switches(backend, share, optimize, torch_compile, memory, calibration)
        super().__init__(program, tensors, switches)
        self.source = source or {}
        self.tokenizer = tokenizer
        self.statistics = statistics  # how what `rms` divides by was gathered
        self._warned = False

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
        predict: Predict = "all",
    ) -> SimulatorOutput:
        """Logits of every sequence under the weights that its own training segment gave.

        input_ids: (B, T). train_mask: (B, T) of 0 and 1; position t carries loss iff train_mask[t +
        1] is 1; its target is token t + 1. loss_mask: (B, T), narrows the targets. attention_mask:
        (B, T) with 0 on padding, or (B, T, T); always combined with the causal mask. position_ids:
        (B, T); by default counted over tokens that are no padding.
        labels: (B, T) for the reported losses (mean, shifted by one, -100 ignored). return_initial:
        also compute logits before any update, on all tokens.

        logits_to_keep: logits of the last so many positions only, or of the positions in a tensor
        (K,); 0 for all. The others are then not computed; losses stay those of all labels. Who
        needs no logits at all calls `losses`.

        predict: `rest` for logits of the positions alone that predict tokens behind the training
        segment: from the last training token of the sequence whose segment ends first, so (B, K, V)
        where logits[:, i] are of position T - K + i, and losses of these. At earlier positions the
        last forward pass then computes nothing but the keys and values that the others read.

        The loss whose gradient is followed is a sum over training positions, never a mean. A
        sequence without a target keeps its weights. Raises InputError for inputs that do not fit.
        Source: TINT.md sections 1 and 2.
        """
        batch = Batch(input_ids, train_mask, loss_mask, attention_mask, position_ids)
        inputs = self._train(batch, stacklevel=5)  # torch calls forward
        call = replace(
            self._call(inputs, Output.LOGITS, return_initial),
            kept=predicted_positions(predict, logits_to_keep, inputs, self.device),
        )
        losses: dict[Output, Tensor] = {}
        if labels is None:
            found = self.run(call)
        elif predict == "rest" and call.kept is not None:
            first = inputs.shape[1] - len(call.kept)
            of_rest = labels_of_rest(self._labels(labels, batch), first)[:, first:]
            found = self.run(call)
            losses = {kind: language_loss(found[kind], of_rest) for kind in call.outputs}
        else:
            found, losses = self._run_with_losses(call, self._labels(labels, batch))
        out = SimulatorOutput(
            found[Output.LOGITS],
            found.get(Output.INITIAL_LOGITS),
            losses.get(Output.LOGITS),
            losses.get(Output.INITIAL_LOGITS),
        )
        return out.of(Asked(batch))

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's own returns Any

    def losses(
        self,
        input_ids: Tensor,
        train_mask: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_initial: bool = False,
        predict: Predict = "all",
    ) -> SimulatorLosses:
        """The losses of every token under the updated weights; under torch.inference_mode() without
        ever holding all logits.

        Arguments as in `forward`; labels as there. A memory of (B, T, V) numbers, which is often
        the largest, is never needed. With predict `rest` other labels count as -100. In front of
        the first label that counts, nothing is computed that no later position reads.
        """
        batch = Batch(input_ids, train_mask, loss_mask, attention_mask, position_ids)
        inputs = self._train(batch)
        asked = predicted_positions(predict, 0, inputs, self.device)
        labels = self._labels(labels, batch)
        if asked is not None:
            labels = labels_of_rest(labels, inputs.shape[1] - len(asked))
        kept = labelled_positions(labels)
        call = self._call(inputs, Output.LOSSES, return_initial)
        call = replace(call, kept=kept, some_losses=True)
        found = self.run(call.labelled(labels))
        if kept is not None:  # the last positions of all
            before = inputs.shape[1] - len(kept)
            found = {kind: F.pad(value, (before, 0)) for kind, value in found.items()}
        losses, initial = found[Output.LOSSES], found.get(Output.INITIAL_LOSSES)
        out = SimulatorLosses(losses, mean_loss(losses, labels), initial)
        return out.of(Asked(batch, labels))

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
        batch = Batch(input_ids, train_mask, loss_mask, attention_mask, position_ids)
        updates = self._updates(batch.row(index))
        return Adapted(self, Updates(updates, frozenset())).state_dict()

    def updates(
        self,
        input_ids: Tensor,
        train_mask: Tensor,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Values of the updated prefix slots after the last step, one a sequence: (B, O, I) or (B,
        D), at least in float32.
        """
        return self._updates(Batch(input_ids, train_mask, loss_mask, attention_mask, position_ids))

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
        batch = Batch(input_ids, None, None, attention_mask, position_ids)
        inputs = self._prepare(batch)
        check_updates(updates, outputs(self.program.graph)["updates"], len(batch), self.own_dtype)
        call = self._call(inputs, Output.LOGITS)
        kept = kept_positions(logits_to_keep, inputs.shape[1], self.device)
        return self.run(replace(call, kept=kept, given=updates))[Output.LOGITS]

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
        inputs = self._prepare(Batch(input_ids, None, None, attention_mask, position_ids))
        kept = kept_positions(logits_to_keep, inputs.shape[1], self.device)
        kind, tokens = Output.LOGITS.before, inputs.shape[1]
        call = Call((kind,), inputs.tensors, tokens, inputs.causal, kept)
        return self.run(call)[kind]

    def adapt(
        self,
        input_ids: Tensor,
        train_mask: Tensor,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        form: Form = "auto",
    ) -> Adapted:
        """What the inner steps make of every sequence, to score and generate with many times.

        Arguments as in `forward`. form: `weights` keeps own weights, `factors` those of the
        training tokens beside the shared weights, `auto` what decoding a token of every sequence
        reads less of. Raises UsageError for factors of a rule that has none. Source: TINT.md
        section 9.
        """
        batch = Batch(input_ids, train_mask, loss_mask, attention_mask, position_ids)
        with torch.no_grad():
            inputs = self._train(batch)
            factored = factored_slots(self, form, len(batch), inputs.segment)
            call = replace(self._call(inputs, Output.UPDATES), factored=factored)
            return Adapted(self, Updates(self.run_updates(call), factored, inputs.segment))

    def stream(
        self,
        batch: int = 1,
        chunk: int = 128,
        context: int = 384,
        keys: Keys = "recompute",
        reset: Reset = "document",
    ) -> Stream:
        """Score first, then train, over texts of any length, `batch` of them side by side, each
        with weights and state of its own: `stream.step(ids, mask, new_document)`.

        Arguments: see `StreamSettings`. Nothing is differentiable from outside. Source: TINT.md
        section 8.
        """
        return Stream(self, batch, StreamSettings(chunk, context, keys, reset))

    def score_first(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        chunk: int = 128,
        context: int = 384,
        keys: Keys = "recompute",
        unmodified: bool = False,
        progress: Progress | None = None,
    ) -> StreamOutput:
        """The losses of documents, one a row, each token's before it is trained on.

        input_ids: (B, N). attention_mask: (B, N), 0 at padding. unmodified: also the losses of the
        unmodified model in the same windows. progress: called after each chunk with its number and
        scores. Raises InputError for a document without a target, StreamOverflow where a loss is
        not finite.
        """
        check_tensor("input_ids", input_ids)
        settings, batch = StreamSettings(chunk, context, keys), len(input_ids)
        beside = Stream(self, batch, settings, learns=False) if unmodified else None
        stream = Stream(self, batch, settings)
        return score_documents(stream, input_ids, attention_mask, beside, progress)

    def __repr__(self) -> str:
        return as_text(describe(self, self.source))

    def _repr_html_(self) -> str:
        return as_html(describe(self, self.source)) + graph_of_phases(self)

    def _updates(self, batch: Batch) -> dict[str, Tensor]:
        call = self._call(self._train(batch, stacklevel=4), Output.UPDATES)
        return self.run_updates(call)

    def _run_with_losses(
        self, call: Call, labels: Tensor
    ) -> tuple[dict[Output, Tensor], dict[Output, Tensor]]:
        """The outputs, and the mean loss of each: from all logits where all are there, else asked
        for beside them.
        """
        if call.kept is None:
            found = self.run(call)
            return found, {kind: language_loss(found[kind], labels) for kind in call.outputs}
        both = (*call.outputs, *(kind.losses for kind in call.outputs))
        found = self.run(replace(call, outputs=both).labelled(labels))
        return found, {kind: mean_loss(found[kind.losses], labels) for kind in call.outputs}

    def _call(self, inputs: Inputs, kind: Output, initial: bool = False) -> Call:
        """A call for one kind of output. initial: also for the same before any update, of all
        tokens, over which the training pass then runs where nothing keeps it from that.
        """
        kinds = (kind, kind.before) if initial else (kind,)
        whole = initial and whole_initial.name not in self.optimizations
        segment = inputs.shape[1] if whole else inputs.segment
        return Call(kinds, inputs.tensors, segment, inputs.causal, scored=inputs.scored)

    def _labels(self, labels: Tensor, batch: Batch) -> Tensor:
        vocabulary = self.program.facts.vocab_size
        checked = check_labels(labels, batch.input_ids, vocabulary)
        return placed("labels", checked, self.device)

    def _prepare(self, batch: Batch) -> Inputs:
        return prepare(self.program.facts, self.dtype, self.device, batch)

    def _train(self, batch: Batch, stacklevel: int = 3) -> Inputs:
        """The inputs of a call that trains; warns, once, of sequences that hold no target."""
        check_tensor("train_mask", batch.train_mask)
        inputs = self._prepare(batch)
        if inputs.untrained and not self._warned:
            self._warned = True
            warnings.warn(
                f"{inputs.untrained} of {len(batch)} sequences have no training target: their "
                "logits are the unmodified model's (said once)",
                stacklevel=stacklevel,
            )
        return inputs
