"""The model's inputs. What follows from them is `runtime/masks.py`, run on values that write nodes;
values are not checked.

Legend: B sequences, T tokens. The training segment's length is computed from the masks inside the
graph, so that training passes see only the tokens that the loss depends on, whatever the call.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from tintc.compiler.onnx.graph import BATCH, SEGMENT, TOKENS, Graph, Value
from tintc.compiler.onnx.shapes import reshape
from tintc.ir.errors import UsageError
from tintc.runtime.batch import Batch
from tintc.runtime.masks import complete, next_token, segment_length

OPTIONAL = ("loss_mask", "attention_mask", "pair_mask", "position_ids")
_INT = torch.int64


def check_inputs(names: Collection[str]) -> tuple[str, ...]:
    """Optional inputs in their order. Raises UsageError for an unknown one, or for both kinds of
    attention mask.
    """
    unknown = [name for name in names if name not in OPTIONAL]
    if unknown:
        raise UsageError(
            f"there is no input {', '.join(map(str, unknown))}; expected some of "
            f"{', '.join(OPTIONAL)}"
        )
    if {"attention_mask", "pair_mask"} <= set(names):
        raise UsageError(
            "attention_mask and pair_mask are two shapes of one input, (B, T) and (B, T, T); "
            "expected one of them"
        )
    return tuple(name for name in OPTIONAL if name in names)


def add_inputs(
    graph: Graph, names: Collection[str], dtype: torch.dtype, *, labels: bool, whole: bool
) -> dict[str, Value | None]:
    """The inputs of a lowered graph by name, as `ir/inputs.py` lists them, and `labels` of the next
    token.

    names: optional inputs. whole: training passes see all tokens; `segment` is then None.
    """
    shape = (BATCH, TOKENS)
    ids: Any = graph.input("input_ids", shape, _INT)
    for axis, dim in enumerate(shape):
        graph.sizes[dim] = graph.add("Shape", [ids], (1,), _INT, start=axis, end=axis + 1)
    given: dict[str, Any] = {"train_mask": graph.input("train_mask", shape, _INT)}
    if "loss_mask" in names:
        given["loss_mask"] = graph.input("loss_mask", shape, _INT)
    if "attention_mask" in names or "pair_mask" in names:
        dims = shape if "attention_mask" in names else (*shape, TOKENS)
        given["attention_mask"] = graph.input("attention_mask", dims, _INT)
    if "position_ids" in names:
        given["position_ids"] = graph.input("position_ids", shape, _INT)
    rate = graph.input("inner_lr", (), torch.float64 if dtype == torch.float64 else torch.float32)

    columns: Any = _columns(graph)
    completed: Any = complete(Batch(ids, **given), columns, dtype)
    found = {**completed.tensors, "inner_lr": rate, "segment": None}
    if not whole:
        found["segment"] = segment_length(completed.carries_BT, columns)
        graph.sizes[SEGMENT] = reshape(graph, found["segment"], (1,))
    if labels:
        given_labels: Any = graph.input("labels", shape, _INT)
        found["labels"] = next_token(given_labels, -100)
    return found


def _columns(graph: Graph) -> Value:
    """0, 1, ..., T - 1."""
    bounds = [graph.constant(0), reshape(graph, graph.sizes[TOKENS], ()), graph.constant(1)]
    return graph.add("Range", bounds, (TOKENS,), _INT)
