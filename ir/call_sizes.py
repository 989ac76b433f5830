"""How large a call is that costs are told for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from tintc.ir.described import about
from tintc.ir.errors import UsageError
from tintc.ir.facts import ModelFacts

_DEFAULT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """How large a call is, as users ask for it. Every field says beside itself what it is for."""

    tokens: int | None = field(
        default=None,
        metadata=about("Tokens of each sequence; default 256, or what the model has."),
    )
    batch: int = field(default=1, metadata=about("Sequences of one call."))
    train_fraction: float = field(default=0.5, metadata=about("Part of the tokens to train on."))


# Which positions' logits or losses are wanted: all, or those that predict what is not trained on
Predict = Literal["all", "rest"]


class CallSizes(TypedDict):
    """batch sequences of `tokens`, of which training passes see the first `segment`."""

    batch: int
    tokens: int
    segment: int


def length(sizes: CallSizes, symbol: object) -> int:
    """What a size of a recorded shape is in such a call: a number, or a name. K: positions that
    predict what is not trained on.
    """
    tokens, segment = sizes["tokens"], sizes["segment"]
    named = {"B": sizes["batch"], "T": tokens, "S": segment, "K": tokens - segment}
    return symbol if isinstance(symbol, int) else named[str(symbol)]


def call_sizes(
    facts: ModelFacts, *, batch: int = 1, tokens: int | None = None, train_fraction: float = 0.5
) -> CallSizes:
    """batch, tokens and segment of a call that trains on the first part of each sequence; by
    default of 256 tokens, or all that the model has. The segment is one shorter than what is
    trained: its last token is a target only.

    Raises UsageError for a length that the model cannot have.
    """
    limit = facts.longest
    length = tokens if tokens is not None else min(_DEFAULT_TOKENS, limit or _DEFAULT_TOKENS)
    if batch < 1:
        raise UsageError(f"batch is {batch}; expected at least 1")
    if length < 2 or (limit is not None and length > limit):
        raise UsageError(
            f"tokens is {length}; expected 2 to {limit or 'any number'}: a token to train on and "
            "one to predict"
        )
    if not 0 < train_fraction <= 1:
        raise UsageError(f"train_fraction is {train_fraction}; expected more than 0 and at most 1")
    return {
        "batch": batch,
        "tokens": length,
        "segment": max(trained_tokens(length, train_fraction) - 1, 1),
    }


def trained_tokens(tokens: int, train_fraction: float = 0.5) -> int:
    """How many tokens a call trains on."""
    return math.ceil(tokens * train_fraction)
