"""Residual sums go into the product before them, if nothing else reads it."""

import pytest
import torch
from torch import fx

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
from tintc.ir.builder import Builder
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.elementwise import multiply, residual, scale
from tintc.ir.ops.linear import linear_backward, linear_forward, linear_residual
from tintc.ir.ops.low_rank import low_rank
from tintc.passes.optimize.fuse_residuals import fuse_residuals
from tintc.passes.optimize.low_rank_updates import low_rank_updates


def test_forward_and_back() -> None:
    at = pruned(exact())
    found = optimized(fuse_residuals, at)
    fused = calls(found, "linear_residual")
    assert {argument(node, "transpose") for node in fused} == {True, False}
    assert len(fused) == len(calls(at, "residual")) - len(calls(found, "residual"))
    assert all(argument(node, "bias") is None for node in fused if argument(node, "transpose"))
    # What is left adds two embeddings, or reads what has another reader.
    for node in calls(found, "residual"):
        assert all(
            len(x.users) > 1 or not is_tint(x, linear_forward, linear_backward, low_rank)
            for x in node.args
        )


def test_before_factors() -> None:
    """The residual goes into the shared product, below the factors."""
    at = pruned(exact(steps=2), low_rank_updates)
    found = assert_same_results(fuse_residuals, at)
    below = [
        node for node in calls(found, "low_rank") if is_tint(argument(node, "y"), linear_residual)
    ]
    assert {argument(argument(node, "y"), "transpose") for node in below} == {True, False}


def small(make: str) -> Stage:
    """A graph of a few nodes: y = W x, and what `make` names."""
    graph = fx.Graph()
    build = Builder(graph)
    x = build.placeholder("input_ids", ("B", "T", 5), role="input")
    w = build.placeholder("weight", (5, 5), role="parameter")
    fields = {"phase": "forward", "step": 0}
    y = build.call(linear_forward, x, w, None, label="y", **fields)
    if make == "another reader":
        z = build.call(
            multiply, build.call(residual, y, x, label="sum", **fields), y, label="z", **fields
        )
    elif make == "itself twice":
        z = build.call(residual, y, y, label="z", **fields)
    elif make == "the product second":
        z = build.call(residual, x, y, label="z", **fields)
    elif make == "a returned product":
        z = build.call(residual, x, y, label="z", **fields)
        graph.output({"logits": z, "y": y})
        return Stage(graph, Context(exact()))
    else:
        z = build.call(residual, x, build.call(scale, y, 0.5, **fields), label="z", **fields)
    graph.output({"logits": z})
    return Stage(graph, Context(exact()))


@pytest.mark.parametrize(
    "make", ["another reader", "itself twice", "a returned product", "no product"]
)
def test_leaves(make: str) -> None:
    assert_left_alone(fuse_residuals, small(make))


def test_either_side() -> None:
    found = optimized(fuse_residuals, small("the product second"))
    assert [node.target for node in found.graph.nodes if node.op == "call_function"] == [
        torch.ops.tint.linear_residual.default
    ]


CONFIGS = {
    "exact, 2 steps": exact(steps=2),
    "paper": paper(),
    "a call that is differentiated": exact(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_same_numbers(name: str) -> None:
    config: SimulatorConfig = CONFIGS[name]
    assert_same_results(fuse_residuals, pruned(config, differentiable="differentiated" in name))


@pytest.mark.parametrize(
    "name", ["gptj", "llama", "falcon"]
)  # branches side by side, which add to one another, too
@pytest.mark.slow
def test_same_numbers_of_other_models(name: str) -> None:
    assert_same_results(
        fuse_residuals, pruned(exact(), low_rank_updates, model=FAMILIES[name].build())
    )
    assert_same_results(
        fuse_residuals, pruned(exact(), model=FAMILIES[name].build(), low_rank=frozenset())
    )


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "fuse_residuals",
        printed(optimized(fuse_residuals, pruned(paper(), low_rank_updates, layers=1)).graph),
        update_golden,
    )
