"""A product of what no update reached is made once."""

from __future__ import annotations

import pytest
from torch import fx

from tests.support.optimized import (
    assert_left_alone,
    assert_same_results,
    calls,
    exact,
    optimized,
    pruned,
)
from tests.support.stages import Stage, assert_golden, printed
from tintc.ir.builder import Builder, input_node
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.embedding import segment
from tintc.ir.ops.linear import linear_forward
from tintc.passes.optimize.low_rank_updates import low_rank_updates
from tintc.passes.optimize.shared_products import shared_products

LOWEST = "blocks.0.attention.qkv"
TRAINED = ("blocks.*.attention.qkv.weight", "blocks.*.down.weight")  # no norm in front of it


def products(at: Stage, module: str = LOWEST) -> list[fx.Node]:
    return [node for node in calls(at, "linear_forward") if info(node).module == module]


@pytest.mark.parametrize("steps", [1, 3])
def test_of_the_lowest_layer(steps: int) -> None:
    """Queries, keys and values of all passes: three products of all tokens."""
    at = pruned(exact(train=TRAINED, steps=steps), low_rank_updates)
    after = assert_same_results(shared_products, at)
    assert len(products(at)) == 3 * (steps + 1)
    assert [info(node).shape[1] for node in products(after)] == ["T"] * 3
    cut = [n for n in calls(after, "segment") if is_tint(argument(n, "x"), linear_forward)]
    assert len(cut) == 3  # the same for every training pass
    others = [len(calls(each, "linear_forward")) - len(products(each)) for each in (at, after)]
    assert others[0] == others[1]


def test_own_weights_and_other_inputs_stay() -> None:
    """With weights of its own each pass has products of its own, and behind a norm that learns."""
    assert_left_alone(shared_products, pruned(exact(train=TRAINED, steps=3)))
    assert_left_alone(shared_products, pruned(exact(steps=2), low_rank_updates))


@pytest.mark.parametrize("last_first", [False, True])
def test_whichever_comes_first(last_first: bool) -> None:
    at = pruned(exact(train=TRAINED), low_rank_updates)
    (first, *_), output = products(at), at.graph.output_node()
    part = argument(first, "x")
    assert is_tint(part, segment)
    build = Builder(at.graph)
    with at.graph.inserting_before(first if last_first else output):
        more = build.call(
            linear_forward,
            argument(part, "x"),
            *first.args[1:],
            like=first,
            phase="forward",
            step=0,
        )
    output.args = ({**output.args[0], "initial_logits": more},)  # type: ignore[dict-item]
    after = optimized(shared_products, at)
    assert len(products(after)) == 3
    assert input_node(after.graph, "input_ids").users


def test_golden(update_golden: bool) -> None:
    at = pruned(exact(train=TRAINED, steps=2), low_rank_updates)
    assert_golden("shared_products", printed(optimized(shared_products, at).graph), update_golden)
