"""One request of the harness: how its tokens are cut, scored and continued.

Legend: B sequences, T tokens, V vocabulary, C tokens of a continuation.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.errors import InputError, NumericalError, UsageError
from tintc.ir.precision import wide
from tintc.runtime.scoring import read_documents
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.streaming import Stream, StreamOverflow

# Tokens that the model reads, and how many of them, from the left, are the training segment.
Cut = tuple[tuple[int, ...], int]


def cut(context: list[int], continuation: list[int], max_length: int) -> Cut:
    """(tokens that are read, c): context and continuation without its last token, max_length tokens
    at most, cut from the left; the first c >= 1 of them are what is left of the context. Raises
    InputError for a continuation without tokens, or longer than max_length."""
    if not 1 <= len(continuation) <= max_length:
        raise InputError(
            f"a continuation has {len(continuation)} tokens; expected 1 to {max_length}, the "
            "model's max_length"
        )
    kept = (context + continuation)[-(max_length + 1) :]
    return tuple(kept[:-1]), len(kept) - len(continuation)


def windows(
    tokens: list[int], prefix: int, max_length: int, context: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens in front, chunk) of each chunk of a text; see `loglikelihood_rolling`. With context 1
    those of the harness's `get_rolling_token_windows` and `make_disjoint_window`."""
    size = max_length - context + 1
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        yield [prefix, *tokens[:start]][max(0, end - max_length) :], tokens[start:end]


def stream_settings(
    protocol: str, given: dict[str, Any], longest: int | None
) -> StreamSettings | None:
    """How `protocol=stream` cuts a text; None for split. given: fields, None where left out. Raises
    UsageError for what the model cannot have.
    """
    if protocol not in ("split", "stream"):
        raise UsageError(f"protocol is {protocol!r}; expected split or stream")
    fields = {name: value for name, value in given.items() if value is not None}
    if protocol == "split":
        if fields:
            raise UsageError(
                f"{', '.join(fields)} given without a stream; expected protocol=stream"
            )
        return None
    settings = StreamSettings(**fields)
    settings.check(longest)
    return settings


def streamed(
    simulator: Simulator, texts: Sequence[Sequence[int]], batch: int, settings: StreamSettings
) -> list[float]:
    """log p of each text's tokens behind the first, every chunk before it is trained on. At rate 0
    nothing is trained. Raises NumericalError, which names text and chunk.
    """
    totals = [0.0] * len(texts)
    numbers = [number for number, tokens in enumerate(texts) if len(tokens) > 1]
    learns = float(simulator.inner_lr.detach()) != 0
    for start in range(0, len(numbers), batch):
        rows = numbers[start : start + batch]
        stream = Stream(simulator, len(rows), settings, learns=learns)
        documents = [torch.tensor(texts[number]) for number in rows]
        try:
            for document in read_documents(stream, documents):
                scores = torch.cat(document.losses).double()
                totals[rows[document.number]] = -float(scores.sum())
        except StreamOverflow as error:
            raise NumericalError(
                f"text {rows[error.row]} has losses in chunk {error.chunk} that are not finite; "
                "pass a smaller inner_lr"
            ) from error
    return totals


@torch.inference_mode()
def continuation_logits(simulator: Simulator, batch: Sequence[Cut]) -> list[Tensor]:
    """Logits (C, V) at each sequence's last token of the context and all behind it, under the
    weights that its context gave.

    Sequences are padded on the right, where the causal mask hides what is padding. At learning rate
    0 nothing is trained.
    """
    longest, first = (
        max(len(tokens) for tokens, _ in batch),
        min(trained for _, trained in batch) - 1,
    )
    ids_BT = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens, _ in batch])
    columns_T, rate = torch.arange(longest), float(simulator.inner_lr.detach())
    train_BT = columns_T < torch.tensor([[trained if rate else 0] for _, trained in batch])
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*have no training target"
        )  # as documented of contexts of one token
        logits = simulator(ids_BT, train_BT, logits_to_keep=columns_T[first:]).logits
    return [
        logits[b, trained - 1 - first : len(tokens) - first]
        for b, (tokens, trained) in enumerate(batch)
    ]


def score(logits_CV: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """(log-probability, whether it is the greedy one) of a continuation. Raises NumericalError
    unless the first is finite.
    """
    targets_C = torch.tensor(continuation, device=logits_CV.device)
    total = -float(F.cross_entropy(wide(logits_CV), targets_C, reduction="sum"))
    if not math.isfinite(total):
        raise NumericalError(
            f"a log-likelihood is {total}: the updated weights are too large; pass a smaller "
            "inner_lr"
        )
    return total, bool((logits_CV.argmax(-1) == targets_C).all())


@torch.inference_mode()
def greedy(simulator: Simulator, context: list[int], count: int) -> Iterator[int]:
    """The likeliest next token, `count` times, under the weights that the context gave; its first
    token is never a target.
    """
    ids = torch.tensor([context])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have no training target")
        updates = simulator.updates(ids, torch.ones_like(ids))
    for _ in range(count):
        token = int(simulator.predict(updates, ids, logits_to_keep=1).argmax())
        yield token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def with_bos(tokenizer: Any, add: object) -> Any:
    """A copy of the tokenizer that puts its bos in front of a text, or does not. Raises UsageError
    unless `add` is True or False, InputError where there is no bos.
    """
    if not isinstance(add, bool):
        raise UsageError(f"add_bos_token is {add!r}; expected True or False")
    if add and tokenizer.bos_token_id is None:
        raise InputError("this tokenizer has no bos token; leave add_bos_token out")
    changed = copy.deepcopy(tokenizer)
    changed.add_bos_token = add
    return changed


def whole_number(name: str, value: object, most: int | None = None) -> int:
    """A whole number of at least 1, and at most `most`; the command line may have left it as
    text.
    """
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if (
        isinstance(number, bool)
        or not isinstance(number, int)
        or number < 1
        or number > (most or number)
    ):
        raise UsageError(
            f"{name} is {value!r}; expected a whole number, "
            f"{f'1 to {most}' if most else 'at least 1'}"
        )
    return number
