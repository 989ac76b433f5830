"""From a softmax back to the product of queries and keys: what happens to the scores in between.

    softmax(where(mask, cap * tanh(scale * q k^T / cap) + bias, -inf))
      ->  Scores: q, k, scale, softcap, offsets, hidden

and from offsets and masks to a window and a bias of each key. Both are evaluated, at the longest
sequence and at a short one, not matched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tintc.ir.builder import operands
from tintc.ir.context import Context
from tintc.passes.analysis.coordinates import Untraceable
from tintc.passes.analysis.evaluation import (
    LONGEST,
    SHORT,
    Evaluation,
    constant,
    evaluable,
    is_positional,
    lengths_below,
    reads_weights,
)
from tintc.passes.analysis.patterns import VIEWS, aten, calls, sizes

_HIDDEN = -1e4  # a score this far below another has probability 0 in every dtype
_MOST_SCORES = 2**27  # evaluated at once
_ROUNDING = 4 * torch.finfo(torch.float32).eps


@dataclass
class Scores:
    """q, k: operands of the product; k's tokens come last where keys_last. offsets: (node, factor)
    that are added to the scores.
    hidden: (condition, value of it that hides, score that it puts there). merged: batch and heads
    are one axis of the product."""

    q: Any
    k: Any
    keys_last: bool
    scale: float
    softcap: float = 0.0
    offsets: list[tuple[fx.Node, float]] = field(default_factory=list)
    hidden: list[tuple[fx.Node, bool, float]] = field(default_factory=list)
    is_causal: bool = False
    merged: bool = False


@dataclass(frozen=True)
class Looks:
    """Who may look at whom. window: to how many tokens back, its own included; 0 for all. bias:
    (positions, heads), what each head adds to the scores of a key at a position, or None."""

    window: int
    bias: Tensor | None


def read_scores(softmax: fx.Node, context: Context) -> Scores:
    """The chain above a softmax. Raises Untraceable with what it met."""
    path: list[tuple[str, Any]] = []  # what happens to the scores, last first
    node: Any = softmax.args[0]
    while not calls(node, aten.matmul, aten.bmm, aten.baddbmm):
        node, effect = _step(node, context)
        path.append(effect)
    scores = _product(node)
    before: float | None = None  # the scale in front of a soft-cap
    factor = scores.scale
    for what, value in reversed(path):
        if what == "scale":
            factor *= value
            scores.offsets = [(n, f * value) for n, f in scores.offsets]
            scores.hidden = [(n, when, fill * value) for n, when, fill in scores.hidden]
        elif what == "cap":
            if before is not None or scores.offsets or scores.hidden:
                raise Untraceable("its scores are capped behind a mask or twice")
            before, factor = factor, 1.0
        elif what == "add":
            scores.offsets.append(value)
        elif what == "hide":
            scores.hidden.append(value)
    if any(fill > _HIDDEN for _, _, fill in scores.hidden):
        raise Untraceable(f"what it hides keeps a score above {_HIDDEN:.0f}")
    scores.scale = factor if before is None else before * factor
    scores.softcap = 0.0 if before is None else factor
    return scores


def _step(node: Any, context: Context) -> tuple[Any, tuple[str, Any]]:
    """(the scores that the node reads, what it does to them)."""
    if calls(node, *VIEWS, aten.to, aten.unsqueeze, aten.squeeze):
        return node.args[0], ("view", None)
    if (
        calls(node, aten.maximum, aten.max)
        and len(node.args) == 2
        and _is_low(node.args[1], context)
    ):
        return node.args[0], ("view", None)  # a floor for what masks have added up to
    if calls(node, aten.tanh):
        return node.args[0], ("cap", None)
    if (
        calls(node, aten.masked_fill)
        and is_positional(node.args[1])
        and (fill := constant(node.args[2], context)) is not None
    ):
        return node.args[0], ("hide", (node.args[1], True, fill))
    if calls(node, aten.where) and is_positional(node.args[0]):
        condition, yes, no = operands(node)
        if (fill := constant(no, context)) is not None:
            return yes, ("hide", (condition, False, fill))
        if (fill := constant(yes, context)) is not None:
            return no, ("hide", (condition, True, fill))
    if (
        calls(node, aten.add, aten.sub, aten.mul, aten.div)
        and len(node.args) == 2
        and not node.kwargs
    ):
        return _arithmetic(node, context)
    raise Untraceable(f"{getattr(node, 'target', node)} stands between its scores and its softmax")


def _arithmetic(node: fx.Node, context: Context) -> tuple[Any, tuple[str, Any]]:
    x, y = operands(node)
    if calls(node, aten.add, aten.mul) and (not isinstance(x, fx.Node) or is_positional(x)):
        x, y = y, x
    if calls(node, aten.mul, aten.div) and (factor := constant(y, context)) is not None:
        return x, ("scale", factor if calls(node, aten.mul) else 1 / factor)
    if calls(node, aten.add, aten.sub) and isinstance(y, fx.Node) and is_positional(y):
        return x, ("add", (y, 1.0 if calls(node, aten.add) else -1.0))
    raise Untraceable(f"{node.target} computes with its scores and {y}")


def _is_low(value: Any, context: Context) -> bool:
    plain = constant(value, context)
    return plain is not None and plain <= _HIDDEN


def _product(node: fx.Node) -> Scores:
    if calls(node, aten.baddbmm):
        bias, q, k = operands(node)
        beta, alpha = (float(node.kwargs.get(name, 1.0)) for name in ("beta", "alpha"))  # type: ignore[arg-type]
        return Scores(q, k, True, alpha, offsets=[(bias, beta)] if beta else [], merged=True)
    q, k = operands(node)
    return Scores(q, k, True, 1.0, merged=len(sizes(node)) == 3)


def read_looks(scores: Scores, heads: int, context: Context) -> Looks:
    """Evaluates masks and biases up to the longest sequence, which becomes the simulator's limit.

    Raises Untraceable for what is no causal mask or window with a bias for each key.
    """
    pieces = [*(n for n, _ in scores.offsets), *(n for n, _, _ in scores.hidden)]
    for node in pieces:
        if not is_positional(node):
            raise Untraceable(
                "its mask or bias depends on "
                f"{'a weight' if reads_weights(node) else 'the token ids'}"
            )
    if not scores.offsets and not scores.hidden:
        if not scores.is_causal:
            raise Untraceable("it is not causal: every position sees every other")
        return Looks(0, None)
    length = min(context.facts.max_tokens or LONGEST, LONGEST)
    if length * length * heads > _MOST_SCORES and any(_headed(node) for node, _ in scores.offsets):
        length = int((_MOST_SCORES / heads) ** 0.5)
    try:
        values = evaluable(pieces, length, context)
    except (RuntimeError, TypeError, KeyError, IndexError) as error:
        raise Untraceable(f"its mask cannot be evaluated from the sizes alone ({error})") from error
    looks = _at(scores, heads, values)
    _refuse_batch(pieces, scores.merged, context)
    for length in lengths_below(values.length):
        few = Evaluation(1, length, context)
        if not _same_looks(looks, _at(scores, heads, few), length):
            raise Untraceable(
                f"its mask or bias depends on the length of the sequence: {length} and "
                f"{values.length} tokens have different ones"
            )
    context.limit_tokens(values.length)
    return looks


def _same_looks(long: Looks, short: Looks, length: int) -> bool:
    """Whether a short sequence has the window and the biases that the long one has at its first
    tokens.
    """
    window = long.window if long.window < length else 0
    nothing = torch.zeros(length, 1, dtype=torch.float64)
    first, other = (
        nothing if looks.bias is None else looks.bias[:length] for looks in (long, short)
    )
    return short.window == window and bool(
        ((first - other).abs() <= 1e-6 + 1e-5 * first.abs()).all()
    )


def _at(scores: Scores, heads: int, values: Evaluation) -> Looks:
    """Looks at one length."""
    length = values.length
    causal = torch.ones(length, length, dtype=torch.bool).tril_()
    visible = causal if scores.is_causal else torch.ones(1, 1, dtype=torch.bool)
    conditions = [
        (_planes(values.of(condition)).bool(), when) for condition, when, _ in scores.hidden
    ]
    offsets = [_planes(values.of(node)) * factor for node, factor in scores.offsets]
    shown = (~planes if when else planes for planes, when in conditions)
    for planes in (*shown, *map(_kept, offsets)):
        if len(planes) > 1 and not bool((planes == planes[:1]).all()):
            raise Untraceable("its heads have different masks")
        visible = visible & planes[0]
    visible = visible.expand(length, length)
    window = int(visible[-1].sum())  # the last row sees as many as any other
    if not torch.equal(visible, causal if window == length else causal.triu(1 - window)):
        raise Untraceable("its mask is not the causal one, nor a window of it")
    bias = torch.zeros(1, length, dtype=torch.float64)
    for planes in offsets:
        bias = bias + torch.stack([_of_keys(plane, visible) for plane in planes])
    bias = (bias - bias[:, :1]).T
    return Looks(
        0 if window == length else window,
        bias.expand(-1, heads).contiguous() if bool(bias.any()) else None,
    )


def _refuse_batch(pieces: list[fx.Node], merged: bool, context: Context) -> None:
    """Raises Untraceable for a mask or bias that differs between sequences."""
    values = Evaluation(2, SHORT, context)
    for node in pieces:
        try:
            value: Tensor = values.of(node)
        except (RuntimeError, TypeError, KeyError, IndexError):
            continue  # too short a table: it is evaluated at its own length
        has_batch = value.ndim == 4 or (merged and value.ndim == 3)
        if (
            has_batch
            and len(value) % 2 == 0
            and not torch.equal(*value.view(2, -1, *value.shape[1:]))
        ):
            raise Untraceable("its mask or bias differs between sequences")


def _headed(node: fx.Node) -> bool:
    """Whether a value has more than one head and a score for each pair of tokens."""
    shape = node.meta["val"].shape
    return (
        len(shape) > 2
        and shape[-2] != 1
        and any(not isinstance(size, int) or size != 1 for size in shape[-3:-2])
    )


def _planes(value: Tensor) -> Tensor:
    """(heads or 1, T or 1, T)."""
    value = value if value.ndim > 1 else value[None]
    return value.reshape(-1, *value.shape[-2:])


def _kept(planes: Tensor) -> Tensor:
    """Where what is added to the scores does not hide a key."""
    return planes > planes.amax(-1, keepdim=True) + _HIDDEN / 2


def _of_keys(plane: Tensor, visible: Tensor) -> Tensor:
    """(T,): what one head's offsets, (1 or T, T), add to the score of each key, up to what they add
    to a whole row.

    Each number may be off by the rounding of float32, in which models compute their biases.
    """
    if len(plane) == 1:
        return plane[0].double()
    nothing = torch.zeros(plane.shape[-1], dtype=torch.float64)
    if not bool(visible.diagonal(-1).all()) or not bool(torch.where(visible, plane, 0).any()):
        return nothing
    diagonal = plane.diagonal().double()
    of_keys = nothing.clone()
    of_keys[1:] = (diagonal[1:] - plane.diagonal(-1).double()).cumsum(
        -1
    )  # from a key to the next, in a row that sees both
    expected = of_keys[None, :] + (diagonal - of_keys)[:, None]
    allowed = (plane.abs() + diagonal.abs()[:, None]) * _ROUNDING + 1e-9
    if bool((((plane - expected).abs() > allowed) & visible).any()):
        raise Untraceable("its bias is no sum of one for the query and one for the key")
    return of_keys
