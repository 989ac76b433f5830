"""An exported pair in onnxruntime, without torch: train on contexts, then decode under what they
gave. `compiler/onnx/decoding.py` says what the two models take and give.

    pair = OnnxPair(adapt, decode)
    updates = pair.adapt(ids, train_mask)
    decoding = pair.decoding(updates);  logits = decoding(prompt_ids);  logits = decoding(next_ids)

Updates, keys and values stay where onnxruntime put them: no call copies them. Legend: B contexts,
of which each is a row R of decoding; T new tokens, P earlier ones, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tintc.ir.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

Array = np.ndarray[Any, Any]
ADAPT, DECODE, ABOUT = "adapt.onnx", "decode.onnx", "tintc.pair"
UPDATE, PAST_VALUE, PRESENT = "updates.", "past_key_values.", "present."  # names begin so
_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
_BELONG = ("tintc.version", "tintc.config", ABOUT)


@dataclass(frozen=True)
class PairUpdates:
    """What contexts have learned, by the names of the models' inputs and outputs."""

    values: Mapping[str, OrtValue]
    contexts: int  # B
    about: str  # of the pair that made them


class OnnxPair:
    """Both models. Raises ArtifactError for files that are no pair, or not of one export.

    about: the metadata of both. longest: positions, or None. inner_lr: the compiled rate.
    """

    def __init__(self, adapt: InferenceSession, decode: InferenceSession) -> None:
        self._adapt, self._decode = adapt, decode
        self.about = _together(adapt, decode)
        self.longest = _number(self.about, "tintc.max_tokens")
        self.inner_lr = float(self.about["tintc.inner_lr"])
        self.inputs = {value.name: value for value in adapt.get_inputs()}
        self._updates = [value.name for value in adapt.get_outputs()]
        self._outputs = [value.name for value in decode.get_outputs()]
        self._past = [v for v in decode.get_inputs() if v.name.startswith(PAST_VALUE)]
        self.vocabulary = int(decode.get_outputs()[0].shape[-1])

    def adapt(
        self, input_ids: Array, train_mask: Array, inner_lr: float | None = None, **further: Array
    ) -> PairUpdates:
        """What the inner steps make of every context, (B, T). further: attention_mask and others,
        where the pair was exported with them. Raises InputError for inputs that do not fit.
        """
        self._check(input_ids, 0)
        rate_type = _TYPES[self.inputs["inner_lr"].type]
        rate = np.array(self.inner_lr if inner_lr is None else inner_lr, rate_type)
        feed = {"input_ids": input_ids, "train_mask": train_mask, **further}
        if set(feed) | {"inner_lr"} != set(self.inputs):
            raise InputError(
                f"got {', '.join(feed)}; this pair's {ADAPT} takes {', '.join(self.inputs)}"
            )
        for name, value in feed.items():
            if value.shape[:2] != input_ids.shape:
                raise InputError(
                    f"{name} has shape {value.shape}; expected one number for each of "
                    f"{input_ids.shape} tokens"
                )
        given = {name: _value(value.astype(np.int64)) for name, value in feed.items()}
        found = self._adapt.run_with_ort_values(self._updates, {**given, "inner_lr": _value(rate)})
        values = dict(zip(self._updates, found, strict=True))
        return PairUpdates(values, len(input_ids), self.about[ABOUT])

    def decoding(self, updates: PairUpdates) -> Decoding:
        """Raises InputError for updates of another pair."""
        if updates.about != self.about[ABOUT]:
            raise InputError(
                "these updates are of another pair; expected those of this one's adapt"
            )
        return Decoding(self, updates)

    def _check(self, ids: Array, seen: int) -> None:
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise InputError(
                f"input_ids are {ids.dtype} of shape {ids.shape}; expected whole numbers, (B, T)"
            )
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise InputError(
                f"input_ids are from {ids.min()} to {ids.max()}; this model has tokens 0 to "
                f"{self.vocabulary - 1}"
            )
        if self.longest is not None and seen + ids.shape[1] > self.longest:
            raise InputError(
                f"there are {seen + ids.shape[1]} tokens, {seen} of them in the cache; this model "
                f"has {self.longest} positions: begin anew with the last part of the text"
            )

    def run_decode(self, feed: Mapping[str, OrtValue]) -> tuple[Array, dict[str, OrtValue]]:
        """(logits, keys and values of all tokens as the next call takes them)."""
        logits, *present = self._decode.run_with_ort_values(self._outputs, dict(feed))
        names = (PAST_VALUE + name.removeprefix(PRESENT) for name in self._outputs[1:])
        return logits.numpy(), dict(zip(names, present, strict=True))

    def no_keys(self, rows: int) -> dict[str, OrtValue]:
        """Of rows that have read nothing."""
        return {
            value.name: _value(np.zeros(_empty(value.shape, rows), _TYPES[value.type]))
            for value in self._past
        }


class Decoding:
    """Rows that are read on with, each under the weights of its context. seen: (R, P), which of
    their tokens are no padding.
    """

    def __init__(self, pair: OnnxPair, updates: PairUpdates) -> None:
        self._pair, self._updates = pair, updates
        self.seen: Array = np.zeros((updates.contexts, 0), np.int64)
        self._past = pair.no_keys(updates.contexts)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        logits_to_keep: int = 0,
    ) -> Array:
        """(R, K, V) logits of the last K of T new tokens, (R, T), behind all earlier ones; of all
        for 0. attention_mask: (R, T), 0 at padding. Raises InputError for what does not fit, and
        for more tokens than the model has positions.
        """
        pair, tokens = self._pair, input_ids.shape[-1]
        pair._check(input_ids, self.seen.shape[1])
        own = np.ones_like(input_ids) if attention_mask is None else attention_mask
        expected = (len(self.seen), tokens)
        if input_ids.shape != expected or own.shape != expected:
            raise InputError(
                f"input_ids are {input_ids.shape} and their mask is {own.shape}; the updates are "
                f"of {len(self.seen)} contexts: expected {expected} of both"
            )
        seen = np.concatenate([self.seen, own != 0], 1).astype(np.int64)
        positions = np.maximum(seen.cumsum(1) - 1, 0)[:, -tokens:]
        given = {
            "input_ids": input_ids.astype(np.int64),
            "position_ids": positions,
            "attention_mask": seen,
            "logits_to_keep": np.array(logits_to_keep, np.int64),
        }
        new = {name: _value(value) for name, value in given.items()}
        logits, self._past = pair.run_decode({**self._updates.values, **self._past, **new})
        self.seen = seen
        return logits


def _together(adapt: InferenceSession, decode: InferenceSession) -> dict[str, str]:
    """What both say of themselves. Raises ArtifactError where they do not say the same."""
    both = [dict(each.get_modelmeta().custom_metadata_map) for each in (adapt, decode)]
    for name, about in zip((ADAPT, DECODE), both, strict=True):
        if ABOUT not in about:
            raise ArtifactError(
                f"{name} is no model of a pair; expected what tintc.export_onnx_pair wrote"
            )
    made, taken = (
        {value.name: (value.type, value.shape) for value in values if _is_update(value.name)}
        for values in (adapt.get_outputs(), decode.get_inputs())
    )
    differ = [name for name in _BELONG if both[0].get(name) != both[1].get(name)]
    if differ or made != taken or not made:
        what = ", ".join(name.removeprefix("tintc.") for name in differ) or "updates"
        what = what.replace("pair", f"weights ({_digest(both[0])} and {_digest(both[1])})")
        raise ArtifactError(
            f"{ADAPT} and {DECODE} do not belong together: their {what} differ; export both at "
            "once by tintc.export_onnx_pair"
        )
    return both[0]


def _digest(about: Mapping[str, str]) -> str:
    try:
        return str(json.loads(about[ABOUT])["weights"])[:12]
    except (ValueError, KeyError, TypeError):
        return "unknown"


def _is_update(name: str) -> bool:
    return name.startswith(UPDATE)


def _empty(shape: Sequence[int | str], rows: int) -> list[int]:
    """Rows first; the other dimension that has a name is that of earlier tokens."""
    return [rows, *(size if isinstance(size, int) else 0 for size in shape[1:])]


def _value(array: Array) -> OrtValue:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(array)


def _number(about: Mapping[str, str], name: str) -> int | None:
    return int(about[name]) if name in about else None
