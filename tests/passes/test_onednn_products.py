"""oneDNN takes the products of float32 calls on a CPU, and only of those."""

from typing import Any

import pytest
import torch

from tests.support.families import FAMILIES
from tests.support.optimized import (
    assert_left_alone,
    assert_same_results,
    calls,
    exact,
    optimized,
    paper,
    pruned,
)
from tests.support.stages import Stage, assert_golden, printed
from tests.support.tolerances import OPTIMIZED
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument
from tintc.ir.node_meta import info
from tintc.ir.ops.onednn import available
from tintc.passes.optimize.chunk_head import chunk_head
from tintc.passes.optimize.fuse_residuals import fuse_residuals
from tintc.passes.optimize.low_rank_updates import low_rank_updates
from tintc.passes.optimize.onednn_products import onednn_products

FLOAT32 = OPTIMIZED[torch.float32]
OTHERS = (low_rank_updates, fuse_residuals, chunk_head)
TAKEN = ("linear_forward", "linear_backward", "linear_residual", "low_rank", "linear_descent")

needed = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")


def single(config: SimulatorConfig, *before: Any, **options: Any) -> Stage:
    return pruned(config, *before, **{"dtype": torch.float32, **options})


@needed
def test_takes_every_product() -> None:
    at = single(
        exact(steps=2),
        *OTHERS,
        outputs=("losses",),
        low_rank=frozenset({"blocks.0.up.weight", "blocks.1.down.weight"}),
    )
    assert all(calls(at, name) for name in TAKEN)
    found = optimized(onednn_products, at)
    assert not [node.name for name in TAKEN for node in calls(found, name)]
    assert len(calls(found, "onednn_product")) == sum(len(calls(at, name)) for name in TAKEN[:3])
    assert len(calls(found, "onednn_low_rank")) == len(calls(at, "low_rank"))
    assert len(calls(found, "onednn_descent")) == len(calls(at, "linear_descent"))
    heads = [*calls(found, "head_gradient"), *calls(found, "head_losses")]
    assert len(heads) == 3
    assert all(argument(node, "onednn") for node in heads)
    assert calls(found, "bias_descent") and calls(
        found, "attention_forward"
    )  # no products of this kind


@needed
def test_descents_keep_their_slots() -> None:
    """By which updates are returned."""
    at = single(exact(), outputs=("updates",))
    found = optimized(onednn_products, at)
    slots = [info(node).slot for node in calls(found, "onednn_descent")]
    assert slots == [info(node).slot for node in calls(at, "linear_descent")]
    assert None not in slots


@pytest.mark.parametrize(
    "facts",
    [
        *({"dtype": dtype} for dtype in (torch.float64, torch.bfloat16, torch.float16)),
        {"device": "cuda"},
        {"differentiable": True},
    ],
    ids=str,
)
def test_leaves_calls_that_it_is_not_for(facts: dict[str, Any]) -> None:
    assert_left_alone(onednn_products, single(exact(), *OTHERS, **facts))


def test_leaves_everything_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(onednn_products.run.__globals__, "available", lambda: False)
    assert_left_alone(onednn_products, single(exact(), *OTHERS))


@needed
@pytest.mark.parametrize("low_rank", [None, frozenset()], ids=["low rank", "materialized"])
@pytest.mark.parametrize("config", [exact(steps=2), paper()], ids=["exact", "paper"])
def test_same_numbers(config: SimulatorConfig, low_rank: frozenset[str] | None) -> None:
    chosen = {} if low_rank is None else {"low_rank": low_rank}
    assert_same_results(onednn_products, single(config, *OTHERS, **chosen), FLOAT32)


@needed
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_same_numbers_of_other_models(name: str) -> None:
    at = single(exact(), *OTHERS, model=FAMILIES[name].build(), outputs=("losses", "updates"))
    assert_same_results(onednn_products, at, FLOAT32)


@needed
def test_golden(update_golden: bool) -> None:
    at = single(paper(), *OTHERS, layers=1)
    assert_golden("onednn_products", printed(optimized(onednn_products, at).graph), update_golden)
