"""The `tint` dialect: every operator that a lowered graph may hold.

Operators are registered with torch.library and implemented by the plain torch code of
`runtime/primitives`, so a lowered graph is an ordinary fx graph: it prints, runs, takes fake
tensors and can be differentiated from outside. Each has a shape rule, from which passes know all
shapes without running anything. The two back ends, `runtime/backends/fused.py` and
`runtime/backends/transformer/emit.py`, only replace operators; their meaning is fixed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tintc.ir.node_meta import DType, Shape
from tintc.ir.ops import (
    activation,
    attention,
    elementwise,
    embedding,
    head,
    linear,
    loss,
    low_rank,
    norm,
    onednn,
    position,
)


@dataclass(frozen=True)
class Operator:
    """name; schema after the name; implementation; shape rule (arguments with tensors replaced by
    shapes -> shape, or one shape per output); meaning in one line; dtype kind of the result. whole:
    its implementation loops, so that it is not traced into what is emitted but called; such
    operators serve optimizations of calls that no gradient is asked of."""

    name: str
    schema: str
    implementation: Callable[..., Any]
    shape: Callable[..., Any]
    meaning: str
    dtype: DType = "float"
    whole: bool = False


def _same(x: Shape, *_: Any) -> Shape:
    return x


def _prefix_shape(parameter: Shape, start: int, stop: int, period: int, transpose: bool) -> Shape:
    rows, rest = (parameter[-1], parameter[:-1]) if transpose else (parameter[0], parameter[1:])
    assert isinstance(rows, int)
    return ((stop - start) * (rows // period), *rest)


def _linear_shape(x: Shape, weight: Shape, bias: Shape | None = None) -> Shape:
    return (*x[:-1], weight[-2])


def _linear_backward_shape(dy: Shape, weight: Shape) -> Shape:
    return (*dy[:-1], weight[-1])


def _product_shape(
    x: Shape, weight: Shape, bias: Shape | None, addend: Shape | None, transpose: bool
) -> Shape:
    return (*x[:-1], weight[-1 if transpose else -2])


def _addend_shape(
    x: Shape, weight: Shape, bias: Shape | None, addend: Shape, transpose: bool
) -> Shape:
    return addend


def _weight_shape(weight: Shape, *_: Any) -> Shape:
    return ("B", *weight[-2:])


def _vector_shape(vector: Shape, *_: Any) -> Shape:
    return ("B", vector[-1])


def _attention_shape(
    q: Shape,
    k: Shape,
    v: Shape,
    mask: Shape | None,
    bias: Shape | None,
    heads: int,
    kv_heads: int,
    *_: float,
) -> Shape:
    assert isinstance(v[-1], int)
    return (*q[:-1], v[-1] // kv_heads * heads)


def _attention_value_shape(
    do: Shape,
    q: Shape,
    k: Shape,
    mask: Shape | None,
    bias: Shape | None,
    heads: int,
    kv_heads: int,
    *_: float,
) -> Shape:
    assert isinstance(do[-1], int)
    return (*do[:-1], do[-1] // heads * kv_heads)


def _attention_full_shape(
    do: Shape, q: Shape, k: Shape, v: Shape, *_: Any
) -> tuple[Shape, Shape, Shape]:
    return q, k, v


def _flash_forward_shape(q: Shape, k: Shape, v: Shape, heads: int, *_: Any) -> tuple[Shape, Shape]:
    return _attention_shape(q, k, v, None, None, heads, *_[:1]), (q[0], heads, q[1])


def _head_losses_shape(h: Shape, *_: Any) -> Shape:
    return h[:-1]


def _head_logits_shape(
    h: Shape,
    weight: Shape,
    bias: Shape | None,
    behind: list[str],
    factors: list[float],
    into: Shape,
    onednn: bool,
) -> Shape:
    return into


def _token_losses_shape(logits: Shape, labels: Shape) -> Shape:
    return labels


def _embedding_shape(table: Shape, index: Shape, offset: int) -> Shape:
    return (*index, table[-1])


def _mean_embedding_shape(weight: Shape, targets: Shape, mask: Shape) -> Shape:
    return (*targets, weight[-1])


def _concatenated_shape(parts: list[Shape]) -> Shape:
    return (parts[0][0], f"{len(parts)}{parts[0][1]}", *parts[0][2:])


def _kept_shape(x: Shape, kept: Shape) -> Shape:
    return (x[0], kept[0], *x[2:])


def _stacked_shape(parts: list[Shape]) -> Shape:
    return (sum(int(part[0]) for part in parts), *parts[0][1:])


def _columns_shape(x: Shape, start: int, stop: int) -> Shape:
    return (*x[:-1], stop - start)


def _segment_shape(x: Shape, length: Any) -> Shape:
    return (x[0], "S", *x[2:])


def _segment_mask_shape(mask: Shape, length: Any) -> Shape:
    return (*mask[:-2], "S", "S")


_OPERATORS = (
    Operator(
        "prefix", "(Tensor(a) parameter, int start, int stop, int period, bool transpose) -> Tensor(a)",
        linear.prefix, _prefix_shape, "value of a prefix slot before any descent",
    ),
    Operator(
        "embedding", "(Tensor table, Tensor index, int offset) -> Tensor",
        embedding.embedding, _embedding_shape, "rows of a token or position table",
    ),
    Operator("residual", "(Tensor x, Tensor y) -> Tensor", elementwise.residual, _same, "sum of two activations or gradients"),
    Operator("multiply", "(Tensor x, Tensor y) -> Tensor", elementwise.multiply, _same, "product of two activations"),
    Operator("scale", "(Tensor x, float factor) -> Tensor", elementwise.scale, _same, "an activation times a constant"),
    Operator(
        "rotary", "(Tensor x, Tensor cos, Tensor sin, int heads, str pairing, bool transpose) -> Tensor",
        position.rotary, _same, "pairs of coordinates turned by their position",
    ),
    Operator(
        "window_mask", "(Tensor mask, int window) -> Tensor",
        position.window_mask, _same, "a mask, narrowed to the last tokens", dtype="bool",
    ),
    Operator(
        "segment", "(Tensor(a) x, SymInt length) -> Tensor(a)",
        embedding.segment, _segment_shape, "first tokens of a sequence",
    ),
    Operator(
        "kept_tokens", "(Tensor x, Tensor kept) -> Tensor",
        embedding.kept_tokens, _kept_shape, "tokens whose logits are wanted",
    ),
    Operator(
        "segment_mask", "(Tensor(a) mask, SymInt length) -> Tensor(a)",
        embedding.segment_mask, _segment_mask_shape, "first queries and keys of a mask", dtype="bool",
    ),
    Operator(
        "linear_forward", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        linear.linear_forward, _linear_shape, "y = W x + b",
    ),
    Operator(
        "stack_rows", "(Tensor[] parts) -> Tensor",
        linear.stack_rows, _stacked_shape, "weights of several layers, one below the other",
    ),
    Operator(
        "columns", "(Tensor(a) x, int start, int stop) -> Tensor(a)",
        linear.columns, _columns_shape, "one layer's part of a product of several",
    ),
    Operator(
        "linear_backward", "(Tensor dy, Tensor weight) -> Tensor",
        linear.linear_backward, _linear_backward_shape, "dx = W^T dy",
    ),
    Operator(
        "linear_descent", "(Tensor weight, Tensor dy, Tensor x, Tensor inner_lr) -> Tensor",
        linear.linear_descent, _weight_shape, "W - eta sum_t dy x^T",
    ),
    Operator(
        "bias_descent", "(Tensor bias, Tensor dy, Tensor inner_lr) -> Tensor",
        linear.bias_descent, _vector_shape, "b - eta sum_t dy",
    ),
    Operator(
        "low_rank", "(Tensor y, Tensor x, Tensor keys, Tensor values, Tensor inner_lr, bool with_bias) -> Tensor",
        low_rank.low_rank, _same, "y - eta sum_s values_s (keys_s . x)",
    ),
    Operator(
        "concatenate", "(Tensor[] parts) -> Tensor",
        low_rank.concatenate, _concatenated_shape, "factors of several steps",
    ),
    Operator(
        "linear_residual", "(Tensor x, Tensor weight, Tensor? bias, Tensor addend, bool transpose) -> Tensor",
        linear.linear_residual, _addend_shape, "W x + b + addend, or W^T x + addend",
    ),
    Operator(
        "onednn_product", "(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, bool transpose) -> Tensor",
        onednn.onednn_product, _product_shape, "W x + b + addend, or W^T x + addend, by oneDNN", whole=True,
    ),
    Operator(
        "onednn_low_rank", "(Tensor y, Tensor x, Tensor keys, Tensor values, Tensor inner_lr, bool with_bias) -> Tensor",
        onednn.onednn_low_rank, _same, "low_rank, by oneDNN", whole=True,
    ),
    Operator(
        "onednn_descent", "(Tensor weight, Tensor dy, Tensor x, Tensor inner_lr) -> Tensor",
        onednn.onednn_descent, _weight_shape, "linear_descent, by oneDNN", whole=True,
    ),
    Operator(
        "norm_forward", "(Tensor x, Tensor? gamma, Tensor? beta, float eps, str kind, int heads, float offset) -> Tensor",
        norm.norm_forward, _same, "(gamma + offset) f(x) + beta",
    ),
    Operator(
        "norm_backward",
        "(Tensor dy, Tensor x, Tensor? gamma, float eps, str kind, int heads, float offset, str "
        "gradient, float scale) -> Tensor",
        norm.norm_backward, _same, "dx of a norm, first-order or exact",
    ),
    Operator(
        "norm_descent", "(Tensor gamma, Tensor dy, Tensor x, float eps, str kind, int heads, Tensor inner_lr) -> Tensor",
        norm.norm_descent, _vector_shape, "gamma - eta sum_t dy f(x)",
    ),
    Operator(
        "activation_forward", "(Tensor x, str kind) -> Tensor",
        activation.activation_forward, _same, "a(x)",
    ),
    Operator(
        "activation_backward", "(Tensor dy, Tensor x, str kind, str gradient, float scale) -> Tensor",
        activation.activation_backward, _same, "dx of an activation, first-order or exact",
    ),
    Operator(
        "attention_forward",
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, int heads, int kv_heads, float "
        "scale, float softcap) -> Tensor",
        attention.attention_forward, _attention_shape, "softmax(scale q k^T + bias + mask) v",
    ),
    Operator(
        "attention_backward_value",
        "(Tensor do, Tensor q, Tensor k, Tensor? mask, Tensor? bias, int heads, int kv_heads, "
        "float scale, float softcap) -> Tensor",
        attention.attention_backward_value, _attention_value_shape, "dv with the probabilities held constant",
    ),
    Operator(
        "attention_backward_full",
        "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, int heads, int "
        "kv_heads, float scale, float softcap)"
        " -> (Tensor, Tensor, Tensor)",
        attention.attention_backward_full, _attention_full_shape, "dq, dk, dv through the scores",
    ),
    Operator(
        "flash_forward", "(Tensor q, Tensor k, Tensor v, int heads, int kv_heads, float scale) -> (Tensor, Tensor)",
        attention.flash_forward, _flash_forward_shape, "attention_forward under the causal mask, and its rows' sums",
    ),
    Operator(
        "flash_backward",
        "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor sums, int heads, int kv_heads, "
        "float scale)"
        " -> (Tensor, Tensor, Tensor)",
        attention.flash_backward, _attention_full_shape, "attention_backward_full, by torch's fused kernel",
    ),
    Operator(
        "head_gradient",
        "(Tensor h, Tensor weight, Tensor? bias, Tensor targets, Tensor mask, str kind, str[] "
        "behind, float[] factors, bool onednn)"
        " -> Tensor",
        head.head_gradient, _same, "gradient of the summed loss at the head's input, in chunks", whole=True,
    ),
    Operator(
        "head_logits",
        "(Tensor h, Tensor weight, Tensor? bias, str[] behind, float[] factors, Tensor into, bool "
        "onednn) -> Tensor",
        head.head_logits, _head_logits_shape, "logits from the head's input, in chunks, into a given tensor", whole=True,
    ),
    Operator(
        "head_losses",
        "(Tensor h, Tensor weight, Tensor? bias, Tensor labels, str[] behind, float[] factors, "
        "bool onednn) -> Tensor",
        head.head_losses, _head_losses_shape, "token_losses from the head's input, in chunks", whole=True,
    ),
    Operator(
        "token_losses", "(Tensor logits, Tensor labels) -> Tensor",
        head.token_losses, _token_losses_shape, "-log p(label) at every position",
    ),
    Operator(
        "loss_gradient", "(Tensor logits, Tensor targets, Tensor mask, str kind) -> Tensor",
        loss.loss_gradient, _same, "gradient of the summed loss at the logits",
    ),
    Operator(
        "mean_embedding_gradient", "(Tensor weight, Tensor targets, Tensor mask) -> Tensor",
        loss.mean_embedding_gradient, _mean_embedding_shape, "mean_v E[v] - E[y], no softmax",
    ),
)  # fmt: skip

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _OPERATORS}

_LIBRARY: Any = torch.library.Library("tint", "DEF")  # type: ignore[no-untyped-call]
for _operator in _OPERATORS:
    _LIBRARY.define(_operator.name + _operator.schema)
    # Composite: torch sees through the operator, so fake tensors, autograd and export need nothing
    # more.
    _LIBRARY.impl(_operator.name, _operator.implementation, "CompositeImplicitAutograd")


def target(name: str) -> Any:
    """The torch operator `tint::name`."""
    return getattr(torch.ops.tint, name).default


_NAMES = {target(name): name for name in OPERATORS}


def tint_name(node: fx.Node) -> str | None:
    """`linear_forward` for a call of `tint::linear_forward`; None for any other node."""
    return _NAMES.get(node.target) if node.op == "call_function" else None


def is_tint(node: fx.Node, *names: str) -> bool:
    """Whether the node calls one of these `tint` operators."""
    return tint_name(node) in names


def argument(node: fx.Node, name: str) -> Any:
    """The argument of a `tint` call by its schema name; None where it was left out."""
    schema = node.target._schema  # type: ignore[union-attr]
    position = [a.name for a in schema.arguments].index(name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)
