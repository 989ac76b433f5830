"""The program of one window of a stream, which scores it and then trains on it: TINT.md section 8.

    input_ids, attention_mask, labels (B, T), new_document (B,), slots.NAME (B, ...)
      ->  losses (B, T), next.slots.NAME (B, ...)

and where keys are cached, with P earlier tokens

    position_ids (B, T), past_mask (B, P), past.NAME (B, P, ...)  ->  present.NAME (B, T, ...)

Weights and the inner rule's own slots are carried by the caller, by the names that a stream's
state_dict has for them. The model holds what they start from, once: a row of new_document has the
auxiliary weights and no state, whatever its slots hold. A row without a label keeps its slots.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from tintc.compiler.onnx.graph import BATCH, PAST, Graph, Value, Values
from tintc.compiler.onnx.inputs import window_inputs
from tintc.compiler.onnx.model import Model, finished, metadata, new_graph
from tintc.compiler.onnx.steps import first_values
from tintc.compiler.onnx.trace import trace_window
from tintc.ir.errors import UsageError
from tintc.runtime.digest import digest_of
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_rows import no_keys
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.uncached import uncached

SLOT, PAST_VALUE = "slots.", "past."  # names of inputs begin so
NEXT, PRESENT = "next.", "present."  # and of outputs: next.slots.NAME, present.NAME
_CACHE = "cache/"


def check_stream(simulator: Simulator, settings: StreamSettings) -> None:
    """Raises UsageError for what has no program of a window, or for windows that the model does
    not take.
    """
    if simulator.structure is not None:
        raise UsageError(
            "the program of a stream's window needs the fused back end; this simulator's is "
            "transformer: compile it with backend=fused"
        )
    if settings.keys == "cache" and uncached(simulator):
        raise UsageError(f"keys=cache: {uncached(simulator)}; expected keys=recompute")
    settings.check(simulator.program.facts.longest)


def build_window(simulator: Simulator, settings: StreamSettings, opset: int) -> Model:
    """Raises UsageError for a simulator or an opset that cannot be exported, UnsupportedModelError
    for an operator that has no standard form."""
    check_stream(simulator, settings)
    graph = new_graph(simulator, opset)
    with graph.scope("inputs"):
        inputs = window_inputs(
            graph,
            simulator.dtype,
            cached=settings.keys == "cache",
            by_length=bool(simulator.program.facts.by_length),
        )
        new = graph.input("new_document", (BATCH,), torch.bool)
        start = {
            slot: _rows(new, value, graph.input(f"{SLOT}{slot}", (BATCH, *sizes), value.dtype))
            for slot, (value, sizes) in first_values(simulator, graph).items()
        }
        past = _past(simulator, graph) if settings.keys == "cache" else None
    losses, last, cache = trace_window(simulator, graph, inputs, start, past)
    with graph.scope("outputs"):
        outputs = {
            "losses": _spread(losses, inputs),
            **_next(inputs, start, last),
            **{named(PRESENT, name): value for name, value in cache.items()},
        }
    return finished(graph, outputs, metadata(simulator) | _about(simulator, settings))


def _past(simulator: Simulator, graph: Graph) -> Values:
    return {
        name: graph.input(named(PAST_VALUE, name), (BATCH, PAST, *value.shape[2:]), value.dtype)
        for name, value in no_keys(simulator, 1).items()
    }


def named(prefix: str, name: str) -> str:
    """A cached value's name in the model."""
    return prefix + name.removeprefix(_CACHE)


def _rows(chosen_B: Value, x: Any, y: Value) -> Value:
    """(B, ...) the rows of x that are chosen, the others of y."""
    each: Any = chosen_B
    for _ in y.dims[1:]:
        each = each.unsqueeze(-1)
    found: Any = torch.where(each, x, y)  # type: ignore[call-overload]
    value: Value = found
    return value


def _next(inputs: dict[str, Any], start: Values, last: Values) -> Values:
    """A row without a label keeps its slots: its rule would still decay, or use its momentum."""
    learns_B = (inputs["labels"] != -100).any(-1)
    return {f"{NEXT}{SLOT}{slot}": _rows(learns_B, last[slot], start[slot]) for slot in start}


def _spread(losses_BK: Any, inputs: dict[str, Any]) -> Value:
    """(B, T), 0 in front of the kept tokens."""
    zeros: Any = torch.zeros_like(inputs["labels"].to(losses_BK.dtype))
    found: Value = zeros.index_copy(1, inputs["kept"], losses_BK)
    return found


def _about(simulator: Simulator, settings: StreamSettings) -> dict[str, str]:
    """As JSON: chunk and context that the model was made with, which others may replace; keys; the
    digest of its weights; how many numbers a row carries.
    """
    said = {name: value for name, value in asdict(settings).items() if name != "reset"}
    digest = digest_of(simulator.prefix.tensors())
    return {"tintc.stream": json.dumps({**said, "weights": digest})}
