"""Attentions spelled in many ways, for toys; and the check that a toy means to its canonical graph
what it means to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.support.stages import Stage, inputs, numbers, stage
from tests.support.tolerances import SIMULATOR, error
from tests.support.toys import Toy, toy
from tintc.ir.dialect import AnyOperator, is_tint
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info

HIDDEN = 6
NEGATIVE = float("-inf")
SDPA = F.scaled_dot_product_attention
Change = Callable[[Tensor, Tensor], Tensor]


def agree(
    model: nn.Module, lengths: tuple[int, ...] = (2, 7, 12), longest: int | None = 64
) -> Stage:
    """The canonical graph, after checking that it computes the model's logits at several lengths up
    to its limit, and in any batch.

    longest: the length up to which masks and tables are evaluated; None for the passes' own limit,
    which takes longer.
    """
    found = stage("refuse_unsupported", model=model, longest=longest)
    most = found.context.facts.longest
    vocab = next(iter(model.parameters())).shape[0]
    assert most is None or most >= min(lengths)
    for length in [n for n in lengths if most is None or n <= most]:
        for batch in (1, 3):
            given = inputs(batch=batch, length=length, vocab=vocab)
            with torch.no_grad():
                expected = model(given["input_ids"])
            assert error(numbers(found, given), expected) < SIMULATOR[torch.float64], (
                f"{batch} x {length}"
            )
    return found


def refusal(model: nn.Module, longest: int | None = 64) -> str:
    """Why the model is refused, in one line."""
    with pytest.raises(UnsupportedModelError) as caught:
        stage("refuse_unsupported", model=model, longest=longest)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def agree_or_refuse(model: nn.Module, lengths: tuple[int, ...] = (2, 7, 12, 30, 60, 170)) -> str:
    """What became of the model, `refused` or `computed right`. Fails for a model that is
    misread.
    """
    try:
        stage("refuse_unsupported", model=model)
    except UnsupportedModelError:
        return "refused"
    agree(model, lengths, longest=None)
    return "computed right"


def calls_of(found: Stage, *operators: AnyOperator) -> list[fx.Node]:
    """The calls of some `tint` operators, in order."""
    return [node for node in found.graph.nodes if is_tint(node, *operators)]


def refusals(found: Stage) -> list[str]:
    """The reasons that passes left on operators."""
    return [info(node).refused for node in found.graph.nodes if info(node).refused]


def heads(x: Tensor, count: int = 2) -> Tensor:
    """(B, T, D) -> (B, H, T, E)."""
    return x.view(x.shape[0], x.shape[1], count, x.shape[2] // count).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """(B, H, T, E) -> (B, T, D)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def projections(m: Toy, x: Tensor) -> list[Tensor]:
    """q, k, v, each (B, 2, T, 3)."""
    return [heads(y) for y in m.wide(x).split(HIDDEN, dim=-1)]


def counted(x: Tensor) -> Tensor:
    """0 1 2 ..., as many as tokens."""
    return torch.arange(x.shape[1], device=x.device)


def back(x: Tensor) -> Tensor:
    """(T, T): how many tokens a key is behind a query; negative for the future."""
    return counted(x)[:, None] - counted(x)[None, :]


def causal(x: Tensor) -> Tensor:
    """(T, T), true where a query may look."""
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def masked(mask: Callable[[Tensor], Tensor], **options: Any) -> Toy:
    """One attention with a mask made from x (B, T, D)."""
    return toy(lambda m, x, ids: merged(SDPA(*projections(m, x), attn_mask=mask(x), **options)))


def hidden_by(mask: Callable[[Tensor], Tensor]) -> Toy:
    """The same, with a boolean mask made additive."""
    return masked(lambda x: torch.where(mask(x), 0.0, NEGATIVE).double())


def written(change: Change) -> Toy:
    """softmax(change(q k^T / sqrt(3), x)) v."""

    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = projections(m, x)
        return merged(torch.softmax(change(q @ k.transpose(-1, -2) / 3**0.5, x), -1) @ v)

    return toy(middle)


def turned(
    q_change: Change, k_change: Change | None = None, v_change: Change = lambda v, x: v
) -> Toy:
    """One attention of 2 heads of 4, with q and k (B, H, T, E) changed by functions of themselves
    and x.
    """

    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        y = m.wide(x)
        q, k, v = heads(y[..., :8]), heads(y[..., 8:16]), heads(x)
        return merged(
            SDPA(q_change(q, x), (k_change or q_change)(k, x), v_change(v, x), is_causal=True)
        )

    return toy(middle)


def angles(
    x: Tensor, size: int = 4, base: float = 100.0, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, size): both halves alike."""
    inverse = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    each = torch.outer(counted(x).double() if positions is None else positions, inverse)
    both = torch.cat([each, each], -1)
    return both.cos(), both.sin()


def rotate_half(x: Tensor) -> Tensor:
    """(-second half, first half) of the last dimension."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """LLaMA's spelling."""
    return x * cos + rotate_half(x) * sin
