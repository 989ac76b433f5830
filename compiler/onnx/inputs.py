"""The model's inputs. What follows from them is `runtime/masks.py`, run on values that write nodes;
values are not checked.

Legend: B sequences, T tokens. The training segment's length is computed from the masks inside the
graph, so that training passes see only the tokens that the loss depends on, whatever the call.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from tintc.compiler.onnx.graph import BATCH, KEPT, PAST, SEGMENT, TOKENS, Graph, Value
from tintc.compiler.onnx.shapes import reshape
from tintc.ir.errors import UsageError
from tintc.runtime.batch import Batch
from tintc.runtime.masks import complete, next_token, past_mask, segment_length

OPTIONAL = ("loss_mask", "attention_mask", "pair_mask", "position_ids")
KEEP = "logits_to_keep"
_INT, _BOOL = torch.int64, torch.bool


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
    graph: Graph,
    names: Collection[str],
    dtype: torch.dtype,
    *,
    labels: bool,
    whole: bool,
    by_length: bool,
) -> dict[str, Value | None]:
    """The inputs of a lowered graph by name, as `ir/inputs.py` lists them, and `labels` of the next
    token.

    names: optional inputs. whole: training passes see all tokens; `segment` is then None.
    by_length: also how many positions each sequence has.
    """
    shape = (BATCH, TOKENS)
    ids: Any = _ids(graph)
    given: dict[str, Any] = {"train_mask": graph.input("train_mask", shape, _INT)}
    if "loss_mask" in names:
        given["loss_mask"] = graph.input("loss_mask", shape, _INT)
    if "attention_mask" in names or "pair_mask" in names:
        dims = shape if "attention_mask" in names else (*shape, TOKENS)
        given["attention_mask"] = graph.input("attention_mask", dims, _INT)
    if "position_ids" in names:
        given["position_ids"] = graph.input("position_ids", shape, _INT)
    rate = _rate(graph, dtype)

    columns: Any = _columns(graph)
    completed: Any = complete(Batch(ids, **given), columns, dtype, by_length=by_length)
    found = {**completed.tensors, "inner_lr": rate, "segment": None}
    if not whole:
        found["segment"] = segment_length(completed.carries_BT, columns)
        graph.sizes[SEGMENT] = reshape(graph, found["segment"], (1,))
    if labels:
        given_labels: Any = graph.input("labels", shape, _INT)
        found["labels"] = next_token(given_labels, -100)
    return found


def window_inputs(
    graph: Graph, dtype: torch.dtype, *, cached: bool, by_length: bool
) -> dict[str, Value | None]:
    """The same of a window of a stream, whose labels are those of the next token as they come. All
    of its tokens are trained on; loss stands at `kept`, from the first label of any sequence on.

    cached: earlier tokens stand in front, as keys and values; positions are given then.
    """
    shape = (BATCH, TOKENS)
    ids: Any = _ids(graph)
    valid: Any = graph.input("attention_mask", shape, _INT)
    given: Any = graph.input("labels", shape, _INT)
    rate = _rate(graph, dtype)
    columns: Any = _columns(graph)
    valid = valid != 0
    labels: Any = torch.where(valid & (given != -100), given, -100)
    if cached:
        past: Any = graph.input("past_mask", (BATCH, PAST), _INT)
        graph.sizes[PAST] = _size(graph, past, 1)
        graph.sizes[f"{PAST}+{TOKENS}"] = graph.add(
            "Add", [graph.sizes[PAST], graph.sizes[TOKENS]], (1,), _INT
        )
        found: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": graph.input("position_ids", shape, _INT),
            "attention_mask": past_mask(past != 0, valid, columns),
        }
    else:
        batch: Any = Batch(ids, ids, attention_mask=valid)
        found = complete(batch, columns, dtype, by_length=by_length).tensors
    has_target: Any = labels != -100
    return {
        **found,
        "targets": labels.clamp(min=0),
        "loss_mask": has_target.to(dtype),
        "labels": labels,
        "kept": _kept(graph, has_target, columns),
        "inner_lr": rate,
        "segment": None,
    }


def decode_inputs(graph: Graph) -> dict[str, Value | None]:
    """The same of new tokens under given updates. attention_mask is of all tokens, those included
    that windows have forgotten.
    """
    shape, every = (BATCH, TOKENS), f"{PAST}+{TOKENS}"
    ids: Any = _ids(graph)
    given: Any = graph.input("attention_mask", (BATCH, every), _INT)
    found = {"input_ids": ids, "position_ids": graph.input("position_ids", shape, _INT)}
    graph.sizes[every] = _size(graph, given, 1)
    kept = _last(graph, graph.input(KEEP, (), _INT, default=torch.tensor(0)))
    graph.sizes[PAST] = graph.add("Sub", [graph.sizes[every], graph.sizes[TOKENS]], (1,), _INT)
    valid: Any = given != 0
    cut = graph.sizes[PAST], graph.sizes[every], graph.ints(1)
    seen: Any = graph.add("Slice", [valid, graph.ints(0), cut[0], cut[2]], (BATCH, PAST), _BOOL)
    own: Any = graph.add("Slice", [valid, *cut], shape, _BOOL)
    columns: Any = _columns(graph)
    mask: Any = past_mask(seen, own, columns)
    return {**found, "attention_mask": mask, "kept": kept}


def _last(graph: Graph, count: Any) -> Value:
    """(K,) the columns of the last tokens, so many of them; all for 0."""
    end: Any = reshape(graph, graph.sizes[TOKENS], ())
    first = torch.where(count == 0, 0, (end - count).clamp(min=0))
    kept = graph.add("Range", [first, end, graph.constant(1)], (KEPT,), _INT)  # type: ignore[list-item]
    graph.sizes[KEPT] = _size(graph, kept, 0)
    return kept


def note_past(graph: Graph, past: Value, axis: int) -> None:
    """That keys of earlier tokens come in, along this axis: as many as there are, or the last ones,
    as a window keeps them.
    """
    held = str(past.dims[axis])
    if held not in graph.sizes:
        graph.sizes[held] = _size(graph, past, axis)
        sizes = [graph.sizes[held], graph.sizes[TOKENS]]
        graph.sizes[f"{held}+{TOKENS}"] = graph.add("Add", sizes, (1,), _INT)


def _kept(graph: Graph, has_target_BT: Any, columns_T: Any) -> Value:
    """(K,) the columns from the first target on, of which there is at least one."""
    end: Any = reshape(graph, graph.sizes[TOKENS], ())
    most: Any = torch.where(has_target_BT, end - columns_T, 1).amax()
    bounds = [end - most, end, graph.constant(1)]
    kept = graph.add("Range", bounds, (KEPT,), _INT)
    graph.sizes[KEPT] = _size(graph, kept, 0)
    return kept


def _ids(graph: Graph) -> Value:
    """The input of tokens, whose sizes are the batch's and the length's."""
    ids = graph.input("input_ids", (BATCH, TOKENS), _INT)
    for axis, dim in enumerate((BATCH, TOKENS)):
        graph.sizes[dim] = _size(graph, ids, axis)
    return ids


def _size(graph: Graph, x: Value, axis: int) -> Value:
    return graph.add("Shape", [x], (1,), _INT, start=axis, end=axis + 1)


def _rate(graph: Graph, dtype: torch.dtype) -> Value:
    return graph.input("inner_lr", (), torch.float64 if dtype == torch.float64 else torch.float32)


def _columns(graph: Graph) -> Value:
    """0, 1, ..., T - 1."""
    bounds = [graph.constant(0), reshape(graph, graph.sizes[TOKENS], ()), graph.constant(1)]
    return graph.add("Range", bounds, (TOKENS,), _INT)
