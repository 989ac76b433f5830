"""What a stream carries from chunk to chunk, and the same as tensors: whoever loads them goes on
with the same bits.

    given/SLOT, states/SLOT    each row's weights and the inner rule's own slots
    cache/...                  keys and values of earlier tokens, with keys=cache
    history, lengths           last tokens of each row, and how many
    cached, positions          tokens in the cache of each row, and the position of its next one
    about                      JSON as bytes: what the stream is, and the chunks so far
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tintc.ir.errors import UsageError
from tintc.runtime.key_cache import KeyCache

Slots = dict[str, Tensor]
VERSION = 1
_AGAIN = "start the stream anew, or load what belongs to it"


@dataclass
class Carried:
    """Of B rows. history: the last L + 1 tokens of each, on the host. given: slot -> (B, ...) each
    row's weights. states: the same of the inner rule's own slots. chunks: steps so far.
    """

    history: list[Tensor]
    given: Slots = field(default_factory=dict)
    states: Slots = field(default_factory=dict)
    cache: KeyCache | None = None
    chunks: int = 0

    def tensors(self, about: Mapping[str, Any]) -> Slots:
        """Copies on the host. about: what the stream is, as JSON takes it."""
        histories = [*self.history, torch.zeros(0, dtype=torch.int64)]
        found = {
            "history": torch.nn.utils.rnn.pad_sequence(histories, batch_first=True)[:-1],
            "lengths": torch.tensor([len(row) for row in self.history]),
            **{f"given/{slot}": value for slot, value in self.given.items()},
            **{f"states/{slot}": value for slot, value in self.states.items()},
        }
        if self.cache is not None:
            found |= self.cache.values  # their names begin with cache/
            found["cached"] = torch.tensor(self.cache.lengths)
            found["positions"] = torch.tensor(self.cache.next_position)
        said = json.dumps({**about, "version": VERSION, "chunks": self.chunks}).encode()
        copies = {name: value.detach().cpu().clone() for name, value in found.items()}
        return {**copies, "about": torch.frombuffer(bytearray(said), dtype=torch.uint8).clone()}

    def load(self, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Raises UsageError for a state of another stream; nothing is changed then."""
        said = _said(state)
        for name, own in {"version": VERSION, **about}.items():
            if said.get(name) != own:
                raise UsageError(_differs(name, said.get(name), own))
        expected = self.tensors(about)
        if set(state) != set(expected):
            wrong = ", ".join(sorted(set(state) ^ set(expected))[:3])
            raise UsageError(f"the state has other entries than this stream ({wrong}); {_AGAIN}")
        for name, value in expected.items():
            fixed = name not in ("about", "history") and not name.startswith("cache/")
            if state[name].dtype != value.dtype or (fixed and state[name].shape != value.shape):
                raise UsageError(f"the state's {name} has another shape or type; {_AGAIN}")
        self._put(state)
        self.chunks = int(said["chunks"])

    def _put(self, state: Mapping[str, Tensor]) -> None:
        lengths = state["lengths"].tolist()
        self.history = [row[:n].clone() for row, n in zip(state["history"], lengths, strict=True)]
        for prefix, values in (("given/", self.given), ("states/", self.states)):
            for slot, old in values.items():
                values[slot] = state[prefix + slot].to(old.device, copy=True)
        if self.cache is not None:
            self.cache.values = {
                name: state[name].to(old.device, copy=True)
                for name, old in self.cache.values.items()
            }
            self.cache.lengths = state["cached"].tolist()
            self.cache.next_position = state["positions"].tolist()


def _said(state: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        said = json.loads(bytes(state["about"].tolist()))
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"this is no state of a stream; {_AGAIN}") from error
    if not isinstance(said, dict) or not isinstance(said.get("chunks"), int):
        raise UsageError(f"this is no state of a stream; {_AGAIN}")
    return said


def _differs(name: str, found: object, expected: object) -> str:
    if name == "weights":
        return f"the state belongs to another model or other weights of it; {_AGAIN}"
    if isinstance(found, dict) and isinstance(expected, dict):
        name, found, expected = next(
            (key, found.get(key), expected.get(key))
            for key in {**expected, **found}
            if found.get(key) != expected.get(key)
        )
    return f"the state was made with {name} {found}; this stream has {expected}: {_AGAIN}"
