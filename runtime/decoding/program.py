"""One step of decoding: new tokens of every row, under the weights that its context gave.

    logits, keys and values of all tokens so far = program(new tokens, those of earlier tokens)

One program for prompts and for single tokens. Its weights are looked up once. Legend: R rows, T new
tokens, P earlier ones, K kept positions, C contexts of n rows each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import uuid4

import torch
from torch import Tensor

from tintc.ir.choices import Contexts
from tintc.ir.outputs import Output
from tintc.runtime.call import Call, without_autocast
from tintc.runtime.compiled import Compiled
from tintc.runtime.decoding.rows import Part, parts
from tintc.runtime.specialize.cached_layers import Values
from tintc.runtime.specialize.programs import Result, Source


@dataclass(frozen=True)
class NewTokens:
    """What a step reads. mask: (R or 1, 1, T, P + T) bool, who may look at whom. kept: (K,) the
    positions among the new ones whose logits are wanted.
    """

    input_ids: Tensor  # (R, T)
    position_ids: Tensor  # (R, T)
    mask: Tensor
    kept: Tensor

    def rows(self, rows: Tensor) -> NewTokens:
        """Some of the rows."""
        mask = self.mask if len(self.mask) == 1 else self.mask[rows]
        return NewTokens(self.input_ids[rows], self.position_ids[rows], mask, self.kept)


@dataclass(frozen=True)
class Updates:
    """What contexts have learned: slot -> (C, ...), or the factors of those in `factored`.

    positions: that the gradient of one step reaches in any of them, at most; None where that is
    not known. name: theirs alone, that of copies too.
    """

    values: Values
    factored: frozenset[str]
    positions: int | None = None
    name: str = field(default_factory=lambda: uuid4().hex, compare=False)

    @property
    def contexts(self) -> int:
        """C."""
        return len(next(iter(self.values.values())))

    def of(self, part: Part) -> Values:
        """Views of some contexts."""
        if part.contexts is Contexts.ONE:
            return {name: value[part.first] for name, value in self.values.items()}
        chosen = slice(part.first, part.first + part.count)
        return {name: value[chosen] for name, value in self.values.items()}


class Decoder:
    """Runs R rows, of which each reads the weights of its context. index: see `rows.parts`."""

    def __init__(
        self, simulator: Compiled, updates: Updates, index: Sequence[int], rows: int
    ) -> None:
        of_rows = parts(index, rows, factored=bool(updates.factored))
        self.parts = [_Bound(simulator, updates, part) for part in of_rows]
        self._rows = [
            None if part.rows is None else torch.tensor(part.rows, device=simulator.device)
            for part in of_rows
        ]

    def __call__(self, new: NewTokens, past: Values) -> tuple[Tensor, Values]:
        """((R, K, V) logits, keys and values of all P + T tokens that a layer still sees)."""
        if self._rows[0] is None:
            return self.parts[0](new, past)
        found = [
            part(new.rows(rows), {name: value[rows] for name, value in past.items()})
            for part, rows in zip(self.parts, self._rows, strict=True)
            if rows is not None
        ]
        back = torch.cat([rows for rows in self._rows if rows is not None]).argsort()
        values = {name: torch.cat([each[name] for _, each in found])[back] for name in found[0][1]}
        return torch.cat([logits for logits, _ in found])[back], values


class _Bound:
    """A program of some rows, and the arguments that stay the same from token to token."""

    def __init__(self, simulator: Compiled, updates: Updates, part: Part) -> None:
        self.simulator, self.part = simulator, part
        self.given, self.factored = updates.of(part), updates.factored
        self._static: list[object] | None = None

    def __call__(self, new: NewTokens, past: Values) -> tuple[Tensor, Values]:
        rows = len(new.input_ids)
        inputs = {
            "input_ids": new.input_ids,
            "position_ids": new.position_ids,
            "attention_mask": new.mask,
            "kept": new.kept,
        }
        if self.part.contexts is Contexts.GROUPS:
            inputs |= self._grouped(new)
        found = self._run(inputs, past)
        logits, values = found[Output.LOGITS], found[Output.CACHE]
        assert isinstance(logits, Tensor) and isinstance(values, dict)
        return logits.reshape(rows, -1, logits.shape[-1]), values

    def _grouped(self, new: NewTokens) -> Values:
        """The n rows of a context as one sequence; `kept` is counted in it."""
        rows, tokens = new.input_ids.shape
        n, contexts = rows // self.part.count, self.part.count
        starts = torch.arange(n, device=new.kept.device) * tokens
        return {
            "input_ids": new.input_ids.reshape(contexts, -1),
            "position_ids": new.position_ids.reshape(contexts, -1),
            "kept": (starts[:, None] + new.kept).flatten(),
        }

    def _run(self, inputs: Values, past: Values) -> dict[str, Result]:
        if self._static is None:
            self._bind(inputs, past)
        dynamic = {Source.INPUT: inputs, Source.GIVEN: past}
        arguments = [
            dynamic[source][name] if value is None else value
            for value, (source, name) in zip(self._static or (), self._arguments, strict=True)
        ]
        with without_autocast(self.simulator.device.type):
            return self._module(*arguments)

    def _bind(self, inputs: Values, past: Values) -> None:
        """Finds the program and looks its weights up."""
        kept = inputs.pop("kept")
        call = Call(
            (Output.LOGITS, Output.CACHE),
            inputs,
            segment=1,
            kept=kept,
            given=self.given,
            cache=past,
            contexts=self.part.contexts,
            factored=self.factored,
        )
        inputs["kept"] = kept
        self._module, self._arguments, weights = self.simulator.bound_weights(call)
        fixed = {**weights, Source.GIVEN: self.given}
        self._static = [fixed.get(source, {}).get(name) for source, name in self._arguments]
