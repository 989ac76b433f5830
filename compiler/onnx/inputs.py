"""The model's inputs, and what `runtime/inputs.py` makes of a user's tensors, as ONNX nodes; values
are not checked.

Legend: B sequences, T tokens. The training segment's length is computed from the masks inside the
graph, so that training passes see only the tokens that the loss depends on, whatever the call.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from tintc.compiler.onnx import elementwise as ops
from tintc.compiler.onnx.graph import BATCH, SEGMENT, TOKENS, Graph, Value
from tintc.compiler.onnx.operators import any_
from tintc.compiler.onnx.shapes import expand, getitem, pad, reshape, unsqueeze
from tintc.ir.errors import UsageError

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
    """The inputs of a lowered graph by name, as `passes.lower_forward.INPUTS` lists them, and
    `labels` of the next token.

    names: optional inputs. whole: training passes see all tokens; `segment` is then None.
    """
    shape = (BATCH, TOKENS)
    ids = graph.input("input_ids", shape, _INT)
    for axis, dim in enumerate(shape):
        graph.sizes[dim] = graph.add("Shape", [ids], (1,), _INT, start=axis, end=axis + 1)
    train = _not_zero(graph, graph.input("train_mask", shape, _INT))
    if "loss_mask" in names:
        train = ops.logical_and(
            graph, train, _not_zero(graph, graph.input("loss_mask", shape, _INT))
        )
    attention = None
    if "attention_mask" in names or "pair_mask" in names:
        dims = shape if "attention_mask" in names else (*shape, TOKENS)
        attention = _not_zero(graph, graph.input("attention_mask", dims, _INT))
    positions = graph.input("position_ids", shape, _INT) if "position_ids" in names else None
    inner_lr = graph.input(
        "inner_lr", (), torch.float64 if dtype == torch.float64 else torch.float32
    )

    columns = _columns(graph)
    allowed, valid = _allowed(graph, attention, columns)
    carries = _next(graph, train)
    if valid is not None:
        carries = ops.logical_and(
            graph, ops.logical_and(graph, carries, valid), _next(graph, valid)
        )
    found: dict[str, Value | None] = {
        "input_ids": ids,
        "position_ids": _positions(graph, valid, columns) if positions is None else positions,
        "attention_mask": allowed,
        "targets": _shifted(graph, ids, 0),
        "loss_mask": ops.cast(graph, carries, dtype),
        "inner_lr": inner_lr,
        "segment": None if whole else _segment(graph, carries, columns),
    }
    if labels:
        found["labels"] = _shifted(graph, graph.input("labels", shape, _INT), -100)
    return found


def _not_zero(graph: Graph, mask: Value) -> Value:
    return ops.logical_not(graph, ops.eq(graph, mask, 0))


def _columns(graph: Graph) -> Value:
    """0, 1, ..., T - 1."""
    bounds = [graph.constant(0), reshape(graph, graph.sizes[TOKENS], ()), graph.constant(1)]
    return graph.add("Range", bounds, (TOKENS,), _INT)


def _shifted(graph: Graph, x: Value, last: int) -> Value:
    """At position t what stands at t + 1; `last` at the end."""
    moved = pad(graph, getitem(graph, x, (slice(None), slice(1, None))), (0, 1), value=last)
    return Value(graph, moved.name, x.dims, x.dtype)


def _next(graph: Graph, mask: Value) -> Value:
    return ops.cast(graph, _shifted(graph, ops.cast(graph, mask, _INT), 0), torch.bool)


def _allowed(graph: Graph, attention: Value | None, columns: Value) -> tuple[Value, Value | None]:
    """As `runtime.inputs._allowed`: ((B or 1, 1, T, T) who may look at whom, (B, T) tokens that are
    no padding or None).
    """
    rows = unsqueeze(graph, columns, -1)
    causal = ops.ge(graph, rows, columns)
    if attention is None:
        return reshape(graph, causal, (1, 1, TOKENS, TOKENS)), None
    if attention.ndim == 2:
        valid, allowed = attention, ops.logical_and(graph, causal, unsqueeze(graph, attention, 1))
    else:
        allowed = ops.logical_and(graph, causal, attention)
        valid = any_(graph, allowed, -2)
    nothing = ops.logical_not(graph, any_(graph, allowed, -1, keepdim=True))
    allowed = ops.logical_or(
        graph, allowed, ops.logical_and(graph, ops.eq(graph, rows, columns), nothing)
    )
    return unsqueeze(graph, allowed, 1), valid


def _positions(graph: Graph, valid: Value | None, columns: Value) -> Value:
    """Counted over tokens that are no padding."""
    if valid is None:
        return expand(graph, columns, BATCH, TOKENS)
    counted = graph.add(
        "CumSum", [ops.cast(graph, valid, _INT), graph.constant(1)], valid.dims, _INT
    )
    return ops.clamp(graph, ops.sub(graph, counted, 1), min=0)


def _segment(graph: Graph, carries: Value, columns: Value) -> Value:
    """One more than the last position that carries loss in any sequence, at least 1."""
    ends = ops.where(graph, carries, ops.add(graph, columns, 1), graph.constant(1))
    last = graph.add("ReduceMax", [ends, graph.ints(0, 1)], (), _INT, keepdims=0)
    graph.sizes[SEGMENT] = reshape(graph, last, (1,))
    return last
