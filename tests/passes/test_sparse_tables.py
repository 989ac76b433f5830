"""Descents of embeddings that are left as what each training token adds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from tests.support.models import gpt2, opt
from tests.support.optimized import assert_same_results, optimized, pruned
from tests.support.stages import Stage, assert_golden, printed
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import tint_name
from tintc.passes.optimize.low_rank_updates import low_rank_updates
from tintc.passes.optimize.sparse_tables import sparse_tables

OF_EMBEDDINGS = {"same_rows", "rows_of_factors", "scattered_scores", "gathered_scores"}


def tied() -> nn.Module:
    found: nn.Module = opt()
    return found


def untied() -> nn.Module:
    found: nn.Module = opt(tie_word_embeddings=False)
    return found


def config(*patterns: str, steps: int = 2) -> SimulatorConfig:
    return SimulatorConfig.exact(train=patterns or ("*",), steps=steps, inner_lr=0.02)


def calls(at: Stage) -> Counter[str]:
    return Counter(name for node in at.graph.nodes if (name := tint_name(node)))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("model", "patterns", "expected"),
    [
        (tied, ("lm_head.*", "*.0.fc1.bias"), OF_EMBEDDINGS),
        (untied, ("*embed*",), {"same_rows"}),
        (gpt2, ("*.wpe.*", "*.0.mlp.*"), {"same_rows"}),
        (tied, (), OF_EMBEDDINGS),
    ],
    ids=["tied", "untied", "positions", "everything"],
)
def test_no_table_is_copied(
    model: type[nn.Module], patterns: tuple[str, ...], expected: set[str], steps: int
) -> None:
    """Every kind of read, of tables under one or several descents."""
    at = pruned(config(*patterns, steps=steps), low_rank_updates, model=model())
    found = calls(assert_same_results(sparse_tables, at))
    assert calls(at)["embedding_descent"] >= steps
    assert not found["embedding_descent"]
    assert set(found) & OF_EMBEDDINGS == expected - ({"gathered_scores"} if steps == 1 else set())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_calls_that_are_differentiated(dtype: torch.dtype) -> None:
    at = pruned(config(), low_rank_updates, model=tied(), differentiable=True, dtype=dtype)
    limit = 1e-10 if dtype == torch.float64 else 2e-4
    assert not calls(assert_same_results(sparse_tables, at, limit))["embedding_descent"]


def test_a_head_with_weights_of_its_own_keeps_its_table() -> None:
    """All descents of a tied weight are left, or none."""
    at = pruned(config(), low_rank_updates, model=tied(), low_rank=frozenset())
    found = calls(optimized(sparse_tables, at))
    assert found["embedding_descent"] == calls(at)["embedding_descent"] - 2  # of positions
    assert found["same_rows"] and not found["scattered_scores"]


def test_leaves_updates_and_other_weights_alone() -> None:
    at = pruned(config(), low_rank_updates, model=untied(), outputs=("updates",))
    assert printed(optimized(sparse_tables, at).graph) == printed(at.graph)
    at = pruned(config("*.fc1.*"), model=untied())
    assert printed(optimized(sparse_tables, at).graph) == printed(at.graph)


def test_golden(update_golden: bool) -> None:
    at = pruned(config("tokens.*", "positions.*", steps=1), layers=1)
    assert_golden("sparse_tables", printed(optimized(sparse_tables, at).graph), update_golden)
