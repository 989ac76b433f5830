"""What a simulator has learned from contexts, to be used many times: scored under, generated from,
saved. TINT.md section 9.

    adapted = simulator.adapt(context_ids, train_mask)
    adapted(prompt_ids).logits;  adapted.generate(prompt_ids, max_new_tokens=200)

Keys and values are computed anew under the updated weights: those of the training pass belong to
other weights. Legend: B sequences that were adapted to, R rows of prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tintc.ir.errors import InputError, UsageError
from tintc.ir.inputs import is_models_own
from tintc.ir.outputs import Output
from tintc.runtime.batch import Batch
from tintc.runtime.call import Call
from tintc.runtime.compiled import Compiled
from tintc.runtime.decoding.form import FORMS, Form, as_weights, together
from tintc.runtime.decoding.program import Decoder, Updates
from tintc.runtime.decoding.prompts import new_tokens
from tintc.runtime.decoding.rows import contexts_of_rows
from tintc.runtime.inputs import check_tensor, prepare
from tintc.runtime.labels import check_labels, kept_positions, language_loss, mean_loss
from tintc.runtime.outputs import SimulatorLosses
from tintc.runtime.prefix import put_rows
from tintc.runtime.showing.of_outputs import Asked
from tintc.runtime.specialize.cached_layers import nothing_cached
from tintc.runtime.uncached import uncached

if TYPE_CHECKING:
    from tintc.runtime.decoding.cache import AdaptedCache


@dataclass(frozen=True)
class AdaptedOutput:
    """logits: (R, T, V), or of the kept positions. loss: mean over the labels, where they were
    given. cache: keys and values of all tokens so far, where it was asked for.
    """

    logits: Tensor
    loss: Tensor | None = None
    cache: AdaptedCache | None = None


class Adapted:
    """A simulator and what it has learned from each of B sequences. `Simulator.adapt` makes it.

    form: how that is held, `weights` of every sequence or `factors` beside the shared ones; both
    give the same numbers up to rounding. Nothing here is differentiable. It reads the simulator's
    own weights too: once these have changed or moved, its calls raise UsageError. Threads may share
    it. Its pickles and copies hold the simulator; load only those that you trust.
    """

    def __init__(
        self, simulator: Compiled, updates: Updates, index: Sequence[int] | None = None
    ) -> None:
        self.simulator, self.updates = simulator, updates
        self.index = tuple(range(updates.contexts)) if index is None else tuple(index)
        self._weights = simulator.weight_states()

    def __len__(self) -> int:
        """B."""
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        """Programs are emitted anew, and a copy's weights stand elsewhere."""
        self._check_weights()
        return type(self), (self.simulator, self.updates, self.index)

    def __repr__(self) -> str:
        kept = sum(value.numel() * value.element_size() for value in self.updates.values.values())
        return (
            f"Adapted({len(self)} sequences, {self.form}, {kept / 2**20:.1f} MB beside the "
            "simulator's weights)"
        )

    @property
    def form(self) -> Form:
        """`factors` where any slot is held so."""
        return "factors" if self.updates.factored else "weights"

    def select(self, rows: Sequence[int] | Tensor | int) -> Adapted:
        """Some of the sequences, in this order, each as often as it is named. Nothing is copied.

        Raises InputError for one that there is not.
        """
        self._check_weights()
        wanted = _whole_numbers(rows)
        wrong = [row for row in wanted if not -len(self) <= row < len(self)]
        if wrong or not wanted:
            raise InputError(
                f"select asks for {wrong[0] if wrong else 'nothing'}; there are {len(self)} "
                "adapted sequences"
            )
        return Adapted(self.simulator, self.updates, [self.index[row] for row in wanted])

    def with_form(self, form: Form) -> Adapted:
        """The same held as own weights. Raises UsageError for factors where there are weights:
        what was summed cannot be taken apart.
        """
        self._check_weights()
        if form not in FORMS:
            raise UsageError(f"form is {form!r}; expected {', '.join(FORMS)}")
        if form == self.form or form == "auto":
            return self
        if form != "weights":
            raise UsageError("own weights do not become factors again; adapt with form='factors'")
        return Adapted(self.simulator, as_weights(self.simulator, self.updates), self.index)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        cache: AdaptedCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> AdaptedOutput:
        """Logits of every row under the weights of its sequence: R is B, or a multiple of it with
        as many rows for each, side by side; one adapted sequence serves any number.

        input_ids: (R, T), behind the cached tokens if there are any. attention_mask: (R, P + T)
        with 0 on padding, of cached and new tokens. labels: (R, T), shifted by one, -100 ignored.
        use_cache: return the cache, or the given one with the new tokens in it.
        cache: as this returned it, for these sequences and rows; copy.deepcopy keeps one.
        Raises InputError for inputs that do not fit.
        """
        check_tensor("input_ids", input_ids)
        if uncached(self.simulator):
            logits = self._uncached(
                input_ids,
                attention_mask,
                position_ids,
                logits_to_keep,
                use_cache or cache is not None,
            )
        else:
            logits, cache = self._decoded(
                input_ids, attention_mask, position_ids, logits_to_keep, cache, use_cache
            )
        loss = None
        if labels is not None:
            if logits.shape[1] != input_ids.shape[1]:
                raise InputError("labels need the logits of all tokens; leave logits_to_keep out")
            vocabulary = self.simulator.program.facts.vocab_size
            loss = language_loss(
                logits, check_labels(labels, input_ids, vocabulary).to(logits.device)
            )
        return AdaptedOutput(logits, loss, cache if use_cache else None)

    @torch.no_grad()
    def losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_initial: bool = False,
    ) -> SimulatorLosses:
        """The losses of every token under the weights of its row's sequence, as
        `Simulator.losses`: without ever holding all logits, which half precision would round.

        Arguments as in a call. return_initial: also before any update. Raises InputError for
        inputs that do not fit.
        """
        check_tensor("input_ids", input_ids)
        batch = Batch(input_ids, None, None, attention_mask, position_ids)
        call = self._whole(batch, self.updates)
        vocabulary, device = self.simulator.program.facts.vocab_size, self.simulator.device
        labels = check_labels(labels, input_ids, vocabulary).to(device)
        kinds = (Output.LOSSES, Output.INITIAL_LOSSES) if return_initial else (Output.LOSSES,)
        # before any update: of all tokens, whatever pass of the program computes it
        call = replace(call, outputs=kinds, segment=call.shape[1])
        found = self.simulator.run(call.labelled(labels))
        losses, initial = found[Output.LOSSES], found.get(Output.INITIAL_LOSSES)
        out = SimulatorLosses(losses, mean_loss(losses, labels), initial)
        # none of these tokens is trained on
        return out.of(Asked(replace(batch, train_mask=torch.zeros_like(input_ids)), labels))

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Hugging Face's own `generate` under the updated weights: greedy, sampling, beams,
        stopping criteria, streamers; batches with left padding.

        Arguments and results: `transformers.GenerationMixin.generate`. Beams and several
        continuations of a prompt share its weights. A cache that a call returned goes on: `cache`,
        or `past_key_values` in older transformers. Raises InputError, before anything is generated,
        for more tokens than the model has positions.
        """
        from tintc.runtime.decoding.generation import generator  # transformers takes seconds

        return generator(self).generate(inputs, **kwargs)

    def state_dict(self, index: int = 0) -> dict[str, Tensor]:
        """The auxiliary model's whole state dict after the training of one sequence; loads back
        into the model. Tied names share one tensor. Of a half-precision simulator, trained weights
        are in float32: their own type would lose much of what they learned.
        """
        one = self.select(index)
        context = one.index[0]
        state = {
            name: tensor.detach().clone()
            for name, tensor in self.simulator.prefix.tensors().items()
            if is_models_own(name)
        }
        sliced = {n: v[context : context + 1] for n, v in self.updates.values.items()}
        weights = as_weights(self.simulator, Updates(sliced, self.updates.factored))
        for slot, value in weights.values.items():
            where = self.simulator.program.layout.prefix[slot]
            state[where.parameter] = state[where.parameter].to(value.dtype)
            put_rows(state[where.parameter], where, value[0].detach())
        return state | {
            alias: state[name] for alias, name in self.simulator.program.aliases.items()
        }

    def new_cache(self, rows: int) -> AdaptedCache:
        """An empty cache for R rows."""
        from tintc.runtime.decoding.cache import AdaptedCache

        self.check_cached()
        sim = self.simulator
        return AdaptedCache(sim.layers, rows, sim.dtype, sim.device, self._made_for)

    def checked_cache(self, cache: object, rows: int) -> AdaptedCache:
        """The cache, if it is of these weights and so many rows; else raises InputError."""
        from tintc.runtime.decoding.cache import checked

        return checked(cache, self._made_for, rows)

    def check_cached(self) -> None:
        """Raises UsageError where nothing can be cached."""
        if uncached(self.simulator):
            raise UsageError(uncached(self.simulator))

    def decoder(self, rows: int) -> Decoder:
        """The program for R rows, with its weights bound: for many steps."""
        self._check_weights()
        return Decoder(self.simulator, self.updates, self.index, rows)

    def read_on(
        self,
        decoder: Callable[[int], Decoder],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        cache: AdaptedCache | None,
    ) -> Tensor:
        """Logits of new tokens by the decode program, the one of prompts and single tokens, behind
        those in the cache, which takes the new ones. decoder: gives the program for R rows.
        """
        sim, seen = self.simulator, 0 if cache is None else cache.get_seq_length()
        new = new_tokens(sim, input_ids, attention_mask, position_ids, logits_to_keep, seen)
        rows, tokens = new.input_ids.shape
        past = (
            nothing_cached(sim.layers, rows, sim.dtype, sim.device) if cache is None else cache.past
        )
        logits, values = decoder(rows)(new, past)
        if cache is not None:
            cache.append(values, tokens)
        return logits

    def _decoded(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        cache: AdaptedCache | None,
        use_cache: bool,
    ) -> tuple[Tensor, AdaptedCache | None]:
        """With a cache if one is given or asked for."""
        if cache is not None:
            cache = self.checked_cache(cache, len(input_ids))
        elif use_cache:
            cache = self.new_cache(len(input_ids))
        logits = self.read_on(
            self.decoder, input_ids, attention_mask, position_ids, logits_to_keep, cache
        )
        return logits, cache

    @property
    def _made_for(self) -> tuple[str, tuple[int, ...]]:
        """Whose weights a cache belongs to."""
        return self.updates.name, self.index

    def _check_weights(self) -> None:
        if self.simulator.weight_states() != self._weights:
            raise UsageError(
                "the simulator's weights have changed, or moved, since it was adapted; what was "
                "learned belongs to those: adapt again"
            )

    def _uncached(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        cached: bool,
    ) -> Tensor:
        """By the whole sequence anew, where nothing can be cached."""
        if cached:
            self.check_cached()
        updates, sim = as_weights(self.simulator, self.updates), self.simulator
        call = self._whole(Batch(input_ids, None, None, attention_mask, position_ids), updates)
        kept = kept_positions(logits_to_keep, call.shape[1], sim.device)
        return sim.run(replace(call, kept=kept))[Output.LOGITS]

    def _whole(self, batch: Batch, updates: Updates) -> Call:
        """A call for logits of whole sequences, from updates in one of their forms."""
        self._check_weights()
        sim = self.simulator
        inputs = prepare(sim.program.facts, sim.dtype, sim.device, batch)
        of_row = contexts_of_rows(self.index, len(batch))
        given = {name: value[of_row] for name, value in updates.values.items()}
        return Call(
            (Output.LOGITS,), inputs.tensors, 1, inputs.causal, given=given,
            factored=updates.factored,
        )  # fmt: skip


def _whole_numbers(rows: Sequence[int] | Tensor | int) -> list[int]:
    try:
        numbers = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(1, 1)
    kind = numbers.dtype
    fits = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if numbers.ndim > 1 or not (fits or not numbers.numel()):
        shape = f"a tensor of shape {tuple(numbers.shape)}, {kind}"
        got = shape if isinstance(rows, Tensor) else f"{rows!r:.60}"
        raise InputError(f"select got {got}; expected numbers of rows, as in [2, 0, 0]")
    return [int(number) for number in numbers.flatten()]


def stack(adapted: Sequence[Adapted]) -> Adapted:
    """Sequences of several adapted simulators as one, in order, whose rows then run together. Their
    updates are copied; where their forms differ, as own weights.

    Raises UsageError unless all are of one simulator.
    """
    if not adapted:
        raise UsageError("stack got nothing; expected adapted simulators")
    simulator = adapted[0].simulator
    if any(each.simulator is not simulator for each in adapted):
        raise UsageError("stack takes what one simulator has learned; these are of several")
    for each in adapted:
        each._check_weights()
    updates = together(simulator, [each.updates for each in adapted])
    starts, index = 0, []
    for each in adapted:
        index += [starts + context for context in each.index]
        starts += each.updates.contexts
    return Adapted(simulator, updates, index)
