"""Prompts are continued under what a simulator has learned, by Hugging Face's `generate`.

Legend: R rows, one a prompt, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tintc import interrupts
from tintc.commands import console
from tintc.commands.generating import Sampling
from tintc.commands.loaded import tokenizing
from tintc.commands.prompt import Prompt
from tintc.commands.said import COLDEST, settled, up_to_stop
from tintc.commands.text import not_finite, room
from tintc.ir.builder import outputs
from tintc.ir.errors import NumericalError
from tintc.runtime.adapted import Adapted
from tintc.runtime.simulator import Simulator
from tintc.runtime.uncached import uncached

# Bytes of own weights that contexts which run together may take. More of them share little: each
# token reads the weights of its own context.
_LEARNED = 2 << 30


@dataclass(frozen=True)
class Continued:
    """text: of the tokens, up to a stop text, which is left out."""

    tokens: int
    text: str


class Continuing:
    """How prompts of one simulator are continued. count: tokens, at most. tokens: generated so
    far.
    """

    def __init__(self, simulator: Simulator, asked: Sampling, count: int) -> None:
        self.simulator, self.count = simulator, count
        self.tokens = 0
        self._waited, self._seconds, self._timed = 0.0, 0.0, 0
        tokenizer = simulator.tokenizer
        special = {str(token) for token in tokenizer.all_special_tokens}
        stops = asked.stop or []
        self.stops = [text for text in stops if text not in special]
        # A special token is no text of what is read back; as an end token it is found.
        ends = [tokenizer.convert_tokens_to_ids(text) for text in stops if text in special]
        if tokenizer.eos_token_id is not None:
            ends.append(tokenizer.eos_token_id)
        self.ends: frozenset[int] = frozenset(ends)
        self._options = self._how(asked)
        torch.manual_seed(asked.seed or 0)

    def speed(self) -> dict[str, Any]:
        """As JSON values. The first token of each prompt, for which the prompt is read, and the
        first program made, is timed apart.
        """
        return {
            "generated_tokens": self.tokens,
            "first_token_seconds": self._waited,
            "tokens_per_second": self._timed / self._seconds if self._timed else None,
        }

    def one(self, adapted: Adapted, prompt: Sequence[int], streamer: Timed) -> Continued:
        """streamer: gets the tokens as they come."""
        fits = room(self.simulator.program.facts.longest, len(prompt), self.count)
        return self._generate(adapted, [prompt], fits, streamer)[0]

    def rows(
        self, adapted: Adapted, prompts: Sequence[Sequence[int]], stage: Callable[[str], None]
    ) -> list[Continued]:
        """One for each sequence of `adapted`: side by side where the longest has room for all
        tokens, for padding takes positions too, else each alone. stage: called in front of each
        token.
        """
        longest = self.simulator.program.facts.longest
        widest = max(len(prompt) for prompt in prompts)
        if longest is None or widest + self.count <= longest:
            return self._generate(adapted, prompts, self.count, Staged(stage, self.count))
        found = []
        for row, prompt in enumerate(prompts):
            try:
                found.append(self.one(adapted.select(row), prompt, Staged(stage, self.count)))
            except Diverged as error:
                error.row = row
                raise
        return found

    def text_of(self, ids: list[int]) -> tuple[str, bool]:
        """What is read, without special tokens, up to a stop text, and whether there is one."""
        text = str(self.simulator.tokenizer.decode(ids, skip_special_tokens=True))
        return up_to_stop(text, self.stops)

    def _how(self, asked: Sampling) -> dict[str, Any]:
        """Options of `generate`. Nothing is cut from the distribution but by top_p."""
        tokenizer = self.simulator.tokenizer
        pad = tokenizer.pad_token_id
        options = {
            "do_sample": asked.temperature is not None,
            "pad_token_id": pad if pad is not None else min(self.ends, default=0),
            "use_cache": not uncached(self.simulator),
            "logits_processor": LogitsProcessorList([_Finite(self.simulator)]),
        }
        if self.ends:
            options["eos_token_id"] = sorted(self.ends)
        if asked.temperature is not None:
            options["temperature"] = max(asked.temperature, COLDEST)
            options["top_p"] = 1.0 if asked.top_p is None else asked.top_p
            options["top_k"] = 0
        return options

    def _generate(
        self,
        adapted: Adapted,
        prompts: Sequence[Sequence[int]],
        count: int,
        streamer: Timed,
    ) -> list[Continued]:
        if count < 1:
            return [Continued(0, "") for _ in prompts]
        widest, pad = max(len(prompt) for prompt in prompts), self._options["pad_token_id"]
        ids_RT = torch.full((len(prompts), widest), pad)
        mask_RT = torch.zeros_like(ids_RT)
        for row, prompt in enumerate(prompts):
            ids_RT[row, widest - len(prompt) :] = torch.tensor(prompt)
            mask_RT[row, widest - len(prompt) :] = 1
        stops = _Stops(self, widest)
        device = self.simulator.device
        found = adapted.generate(
            ids_RT.to(device),
            attention_mask=mask_RT.to(device),
            max_new_tokens=count,
            stopping_criteria=StoppingCriteriaList([stops] if self.stops else []),
            streamer=streamer,
            **self._options,
        )
        rows = [
            self._without_end(ids[: stops.ended.get(row)])
            for row, ids in enumerate(found[:, widest:].tolist())
        ]
        self.tokens += sum(len(ids) for ids in rows)
        first, last = streamer.first - streamer.begun, streamer.last - streamer.first
        self._waited, self._seconds = self._waited + first, self._seconds + last
        self._timed += sum(max(len(ids) - 1, 0) for ids in rows)
        return [Continued(len(ids), self.text_of(ids)[0]) for ids in rows]

    def _without_end(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[:end]


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """Ends a row at a stop text in what was generated; a prompt may well hold it. ended: row -> how
    many tokens it has then.
    """

    def __init__(self, continuing: Continuing, start: int) -> None:
        self.continuing, self.start = continuing, start
        self.ended: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **further: Any) -> Tensor:
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            if row not in self.ended and self.continuing.text_of(ids)[1]:
                self.ended[row] = len(ids)
        done = [row in self.ended for row in range(len(input_ids))]
        return torch.tensor(done, device=input_ids.device)


class Diverged(NumericalError):
    """The updated weights give no finite logits. row: of the prompts."""

    def __init__(self, row: int, rate: float) -> None:
        super().__init__(not_finite(rate))
        self.row = row


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Raises Diverged."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.amax(-1).isfinite()
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise Diverged(row, float(self.simulator.inner_lr.detach()))
        return scores


class Timed(BaseStreamer):  # type: ignore[misc]
    """Gets tokens as they come. steps: of all rows. begun, first, last: seconds on one clock, of
    the prompts and of the first and last tokens.
    """

    steps = -1
    begun = first = last = 0.0

    def put(self, value: Tensor) -> None:
        """The first that comes are the prompts."""
        interrupts.check()
        self.steps, self.last = self.steps + 1, time.perf_counter()
        if self.steps == 0:
            self.begun = self.last
        elif self.steps == 1:
            self.first = self.last

    def end(self) -> None:
        """There is nothing to do."""


class Staged(Timed):
    """Names each step of a bar, of so many, before it is computed."""

    def __init__(self, stage: Callable[[str], None], count: int) -> None:
        self.stage, self.count = stage, count

    def put(self, value: Tensor) -> None:
        super().put(value)
        if self.steps < self.count:
            self.stage(f"generating token {self.steps + 1}")


class Printed(Timed):
    """Text on standard output as it comes. Its end does not wait for what might have followed."""

    def __init__(self, continuing: Continuing) -> None:
        self.continuing = continuing
        self.ids: list[int] = []
        self.written = ""

    def put(self, value: Tensor) -> None:
        super().put(value)
        if self.steps == 0:
            return
        self.ids += [token for token in value.tolist() if token not in self.continuing.ends]
        text, is_whole = self.continuing.text_of(self.ids)
        self._write(text if is_whole else text[: settled(text, self.continuing.stops)])

    def end(self) -> None:
        self._write(self.continuing.text_of(self.ids)[0])

    def _write(self, text: str) -> None:
        new = text[len(self.written) :]
        if new:
            console.write(new)
            self.written = text


@contextmanager
def printed(continuing: Continuing) -> Iterator[Printed]:
    """A line is ended however generation ends: a message would go on in it."""
    streamer = Printed(continuing)
    try:
        yield streamer
    except BaseException:
        if streamer.written:
            console.write("\n")
        raise
    console.write("\n")


def contexts_at_once(simulator: Simulator, most: int) -> int:
    """How many contexts run together: those whose own weights fit what they may take."""
    shapes = (
        simulator.program.layout.prefix[slot].shape
        for slot in outputs(simulator.program.graph)["updates"]
    )
    size = sum(math.prod(shape) for shape in shapes) * simulator.dtype.itemsize
    return max(1, min(most, _LEARNED // max(size, 1)))


def adapt_to(
    simulator: Simulator, contexts: Sequence[Sequence[int]], trained: Callable[[int], int]
) -> Adapted:
    """What is learned from the first tokens of each context. trained: how many, of so many."""
    widest = max(len(context) for context in contexts)
    ids_RT = torch.zeros(len(contexts), widest, dtype=torch.int64)
    real_RT, train_RT = torch.zeros_like(ids_RT), torch.zeros_like(ids_RT)
    for row, context in enumerate(contexts):
        ids_RT[row, : len(context)] = torch.tensor(context)
        real_RT[row, : len(context)] = 1
        train_RT[row, : trained(len(context))] = 1
    mask = None if bool(real_RT.all()) else real_RT
    return simulator.adapt(ids_RT, train_RT, attention_mask=mask)


def prompt_of(simulator: Simulator, prompt: Prompt) -> list[int]:
    """Raises InputError for a prompt that is longer than the simulator takes, and for a simulator
    that has no tokenizer.
    """
    return prompt.continued(tokenizing(simulator), simulator.program.facts.longest)
