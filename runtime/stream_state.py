"""Where a stream stands, as tensors: whoever loads them goes on with the same bits.

given/SLOT, states/SLOT    each row's weights and the inner rule's own slots
cache/...                  keys and values of earlier tokens, with keys=cache
history, lengths, positions    last tokens of each row, how many, and the next one's position
about                      JSON as bytes: settings, config, digest of the weights, chunks so far
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tintc.ir.errors import UsageError

if TYPE_CHECKING:
    from tintc.runtime.streaming import Stream

VERSION = 1
_AGAIN = "start the stream anew, or load what belongs to it"


def about(stream: Stream) -> dict[str, Any]:
    """What a state must agree with, and how far the stream is."""
    simulator = stream.simulator
    return {
        "version": VERSION,
        "batch": stream.batch,
        "settings": dataclasses.asdict(stream.settings),
        "learns": stream.learns,
        "config": simulator.config.described(),
        "inner_lr": float(simulator.inner_lr.detach()),
        "weights": stream.digest,
        "chunks": stream.chunks,
    }


def state_of(stream: Stream) -> dict[str, Tensor]:
    """Copies on the host."""
    histories = [*stream.history, torch.zeros(0, dtype=torch.int64)]
    found = {
        "history": torch.nn.utils.rnn.pad_sequence(histories, batch_first=True)[:-1],
        "lengths": torch.tensor([len(row) for row in stream.history]),
        **{f"given/{slot}": value for slot, value in stream.given.items()},
        **{f"states/{slot}": value for slot, value in stream.states.items()},
    }
    if stream.cache is not None:
        found |= stream.cache.values  # their names begin with cache/
        found["cached"] = torch.tensor(stream.cache.lengths)
        found["positions"] = torch.tensor(stream.cache.next_position)
    said = json.dumps(about(stream)).encode()
    copies = {name: value.detach().cpu().clone() for name, value in found.items()}
    return {**copies, "about": torch.frombuffer(bytearray(said), dtype=torch.uint8).clone()}


def restore(stream: Stream, state: Mapping[str, Tensor]) -> None:
    """Raises UsageError for a state of another stream; nothing is changed then."""
    said = _about(state)
    own = about(stream)
    for name in ("version", "weights", "config", "inner_lr", "settings", "batch", "learns"):
        if said.get(name) != own[name]:
            raise UsageError(_differs(name, said.get(name), own[name]))
    expected = state_of(stream)
    if set(state) != set(expected):
        wrong = ", ".join(sorted(set(state) ^ set(expected))[:3])
        raise UsageError(f"the state has other entries than this stream ({wrong}); {_AGAIN}")
    for name, value in expected.items():
        fixed = name not in ("about", "history") and not name.startswith("cache/")
        if state[name].dtype != value.dtype or (fixed and state[name].shape != value.shape):
            raise UsageError(f"the state's {name} has another shape or type; {_AGAIN}")
    _put(stream, state)
    stream.chunks = int(said["chunks"])


def _about(state: Mapping[str, Tensor]) -> dict[str, Any]:
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


def _put(stream: Stream, state: Mapping[str, Tensor]) -> None:
    device = stream.simulator.device
    lengths = state["lengths"].tolist()
    stream.history = [row[:n].clone() for row, n in zip(state["history"], lengths, strict=True)]
    for prefix, values in (("given/", stream.given), ("states/", stream.states)):
        for slot in values:
            values[slot] = state[prefix + slot].to(device, copy=True)
    if stream.cache is not None:
        stream.cache.values = {n: state[n].to(device, copy=True) for n in stream.cache.values}
        stream.cache.lengths = state["cached"].tolist()
        stream.cache.next_position = state["positions"].tolist()
