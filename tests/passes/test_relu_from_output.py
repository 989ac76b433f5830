"""The slope of a ReLU by what came out of it: the same bits, and nothing holds what went in."""

from __future__ import annotations

import pytest
from torch import fx

from tests.support.models import opt
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
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.activation import activation_backward, activation_forward
from tintc.passes.optimize.relu_from_output import relu_from_output

SAME_BITS = 5e-324


@pytest.mark.parametrize("steps", [1, 2])
def test_same_bits(steps: int) -> None:
    at = pruned(exact(steps=steps), model=opt())
    found = assert_same_results(relu_from_output, at, SAME_BITS)
    backward = calls(found, "activation_backward")
    assert len(backward) == 2 * steps
    for node in backward:
        assert is_tint(argument(node, "x"), activation_forward)
        assert argument(node, "dy") is not argument(node, "x")
    for node in calls(found, "activation_forward"):
        assert list(argument(node, "x").users) == [node]


def small(kind: str, *, forward: bool = True, gradient: str = "exact") -> Stage:
    """a(x), if `forward`, and its derivative."""
    graph = fx.Graph()
    build = Builder(graph)
    x = build.placeholder("input_ids", ("B", "T", 5), role="input")
    dy = build.placeholder("loss_mask", ("B", "T", 5), role="input")
    fields = {"phase": "forward", "step": 0}
    y = build.call(activation_forward, x, kind, **fields) if forward else x
    dx = build.call(activation_backward, dy, x, kind, gradient, 1000.0, **fields)
    graph.output({"logits": y, "dx": dx})
    return Stage(graph, Context(exact()))


def test_alone() -> None:
    found = optimized(relu_from_output, small("relu"))
    (backward,), (forward,) = (calls(found, f"activation_{way}") for way in ("backward", "forward"))
    assert argument(backward, "x") is forward


@pytest.mark.parametrize("kind", ["clamp", "maximum", "gelu", "relu_squared"])
def test_other_activations_tell_more_apart(kind: str) -> None:
    assert_left_alone(relu_from_output, small(kind))


def test_differences_read_what_went_in() -> None:
    assert_left_alone(relu_from_output, small("relu", gradient="first_order"))
    assert_left_alone(relu_from_output, pruned(paper(), model=opt()))


def test_without_an_output() -> None:
    assert_left_alone(relu_from_output, small("relu", forward=False))


def test_golden(update_golden: bool) -> None:
    at = pruned(exact(layers=1), model=opt())
    assert_golden("relu_from_output", printed(optimized(relu_from_output, at).graph), update_golden)
