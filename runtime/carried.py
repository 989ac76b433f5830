"""What rows of a stream carry from chunk to chunk, and the same as tensors: whoever loads them goes
on with the same bits.

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
    """Of some rows. history: the last L + 1 tokens of each, on the host. given: slot -> (B, ...)
    each row's weights. states: the same of the inner rule's own slots.
    """

    history: list[Tensor]
    given: Slots = field(default_factory=dict)
    states: Slots = field(default_factory=dict)
    cache: KeyCache | None = None

    def tensors(self) -> Slots:
        """By the names above, all but `history` and `about`."""
        found = {
            "lengths": torch.tensor([len(row) for row in self.history]),
            **{f"given/{slot}": value for slot, value in self.given.items()},
            **{f"states/{slot}": value for slot, value in self.states.items()},
        }
        if self.cache is not None:
            found |= self.cache.values  # their names begin with cache/
            found["cached"] = torch.tensor(self.cache.lengths)
            found["positions"] = torch.tensor(self.cache.next_position)
        return {name: value.detach().cpu() for name, value in found.items()}

    def put(self, state: Slots) -> None:
        """The inverse of `tensors`, with `history`."""
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


def tensors(groups: list[Carried], about: Mapping[str, Any], chunks: int) -> Slots:
    """Copies on the host, the rows of all groups one below the other. about: what the stream is, as
    JSON takes it.
    """
    history = [row for group in groups for row in group.history]
    parts = [group.tensors() for group in groups]
    found = {name: _below([part[name] for part in parts]) for name in parts[0]}
    found["history"] = torch.nn.utils.rnn.pad_sequence(history, batch_first=True)
    said = json.dumps({**about, "version": VERSION, "chunks": chunks}).encode()
    found["about"] = torch.frombuffer(bytearray(said), dtype=torch.uint8).clone()
    return found


def load(groups: list[Carried], state: Mapping[str, Tensor], about: Mapping[str, Any]) -> int:
    """Puts a state into the groups, and returns the chunks so far. Raises UsageError for a state of
    another stream; nothing is changed then.
    """
    said = _said(state)
    for name, own in {"version": VERSION, **about}.items():
        if said.get(name) != own:
            raise UsageError(_differs(name, said.get(name), own))
    expected = tensors(groups, about, 0)
    if set(state) != set(expected):
        wrong = ", ".join(sorted(set(state) ^ set(expected))[:3])
        raise UsageError(f"the state has other entries than this stream ({wrong}); {_AGAIN}")
    for name, value in expected.items():
        grows = name == "history" or name.startswith("cache/")
        first, second = (
            (x.shape[0], *x.shape[2:]) if grows else x.shape for x in (state[name], value)
        )
        if name != "about" and (state[name].dtype != value.dtype or first != second):
            raise UsageError(f"the state's {name} has another shape or type; {_AGAIN}")
    start = 0
    for group in groups:
        rows = slice(start, start + len(group.history))
        group.put({name: value[rows] for name, value in state.items() if name != "about"})
        start = rows.stop
    return int(said["chunks"])


def _below(parts: list[Tensor]) -> Tensor:
    """(B, ...) of all rows; columns of a cache end together."""
    columns = max(part.shape[1] if part.ndim > 1 else 0 for part in parts)
    even = []
    for part in parts:
        lacking = columns - (part.shape[1] if part.ndim > 1 else columns)
        in_front = part.new_zeros(len(part), lacking, *part.shape[2:]) if lacking else None
        even.append(part if in_front is None else torch.cat([in_front, part], 1))
    return torch.cat(even)


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
