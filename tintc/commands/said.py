"""Tokens are chosen from logits, and read back as text that comes piece by piece. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
COLDEST = 1e-6  # below it, the likeliest token has all; much below, quotients overflow


class Sampler:
    """The likeliest token, or one drawn from softmax(logits / temperature), cut to the likeliest
    that make up top_p.
    """

    def __init__(
        self, temperature: float | None = None, top_p: float | None = None, seed: int | None = None
    ) -> None:
        self.temperature, self.top_p = temperature, 1.0 if top_p is None else top_p
        self._generator = np.random.default_rng(seed or 0)

    def choose(self, logits_V: Array) -> int:
        if self.temperature is None:
            return int(logits_V.argmax())
        p_V = self.probabilities(logits_V)
        return int(self._generator.choice(len(p_V), p=p_V))

    def probabilities(self, logits_V: Array) -> Array:
        """Of a draw, in float64."""
        z_V = logits_V.astype(np.float64) / max(self.temperature or 1.0, COLDEST)
        p_V = np.exp(z_V - z_V.max())
        p_V /= p_V.sum()
        if self.top_p < 1:
            order = np.argsort(-p_V, kind="stable")
            before = p_V[order].cumsum() - p_V[order]
            p_V[order[before >= self.top_p]] = 0  # the likeliest one stays
            p_V /= p_V.sum()
        found: Array = p_V
        return found


class Said:
    """What was generated so far. stops: texts that end it, and are left out. text: without them and
    without special tokens. ended: whether there was one.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.text, self.ended, self._given = "", False, 0

    def add(self, token: int) -> str:
        """What is new, and stays as it is, whatever follows."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.text, self.ended = up_to_stop(text, self.stops)
        return self._up_to(len(self.text) if self.ended else settled(self.text, self.stops))

    def rest(self) -> str:
        """What was held back, where nothing follows."""
        return self._up_to(len(self.text))

    def _up_to(self, end: int) -> str:
        new = self.text[self._given : end]
        self._given += len(new)
        return new


def up_to_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(a text up to the first stop text in it, whether there is one)."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def settled(text: str, stops: Sequence[str]) -> int:
    """How many characters of a text stay as they are, whatever follows: not half a character, nor
    what a stop text may begin with.
    """
    whole = len(text.rstrip("\ufffd"))
    held = (
        size
        for stop in stops
        for size in range(min(len(stop) - 1, whole), 0, -1)
        if stop.startswith(text[whole - size : whole])
    )
    return whole - max(held, default=0)


def surprise(z_TV: Array, targets_T: Array) -> Array:
    """(T,) -log p of each target."""
    top = z_TV.max(-1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(z_TV - top).sum(-1))
    found: Array = log_sum - z_TV[np.arange(len(targets_T)), targets_T]
    return found
