"""Descents as soon as their gradients are known: the same bits in another order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.models import opt
from tests.support.optimized import (
    assert_left_alone,
    assert_same_results,
    exact,
    optimized,
    paper,
    pruned,
)
from tests.support.stages import assert_golden, printed
from tintc.ir.node_meta import info
from tintc.passes.optimize.early_descents import early_descents
from tintc.passes.optimize.onednn_products import onednn_products
from tintc.runtime.specialize.lifetimes import bytes_held, lifetimes
from tintc.runtime.specialize.written_over import written_over

SAME_BITS = 5e-324
OWN: dict[str, Any] = {"low_rank": frozenset()}
CONFIGS = {
    "own weights": (exact(), OWN),
    "own weights, 3 steps": (exact(steps=3), OWN),
    "factors": (exact(steps=2), {}),
    "first order": (paper(), OWN),
    "momentum": (exact(steps=2, momentum=0.9), OWN),
    "decay": (exact(steps=2, decay=0.1), OWN),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_same_bits(name: str) -> None:
    config, facts = CONFIGS[name]
    at = pruned(config, **facts)
    found = assert_same_results(early_descents, at, SAME_BITS)
    assert sorted(n.name for n in found.graph.nodes) == sorted(n.name for n in at.graph.nodes)


def test_by_onednn() -> None:
    at = pruned(exact(steps=2), onednn_products, dtype=torch.float32, **OWN)
    assert_same_results(early_descents, at, SAME_BITS)


@pytest.mark.parametrize("name", CONFIGS)
def test_none_could_be_earlier(name: str) -> None:
    """Right in front of a descent stand others, and in front of those what it waits for."""
    config, facts = CONFIGS[name]
    nodes = list(optimized(early_descents, pruned(config, **facts)).graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    seen = 0
    for node in nodes:
        if node.op != "call_function" or info(node).phase != "descent":
            continue
        before = node.prev
        readers = [user for user in node.args[0].users if place[user] < place[node]]  # type: ignore[union-attr]
        waits = {*node.all_input_nodes, *readers}
        if all(each.op == "placeholder" for each in waits):
            continue  # a number of the inputs alone
        while info(before).phase == "descent" and before not in waits:
            before = before.prev
        assert before in waits
        seen += 1
    assert seen


def test_own_weights_are_still_written_over() -> None:
    at = pruned(exact(steps=3), **OWN)
    before = {node.name for node in written_over(at.graph, at.context.choices)}
    after = optimized(early_descents, at)
    assert (
        before == {node.name for node in written_over(after.graph, after.context.choices)} != set()
    )


def test_less_is_held() -> None:
    """In the end own weights alone, where there were the gradients of all layers: of a long text
    in a deep model.
    """
    at = pruned(exact(), layers=6, longest=None, model=opt(layers=6), **OWN)
    sizes = {"B": 1, "T": 64, "S": 64}
    found = optimized(early_descents, at)
    held = [bytes_held(lifetimes(each.graph), sizes, 8) for each in (at, found)]
    assert held[1] < 0.95 * held[0]


def test_without_descents() -> None:
    assert_left_alone(early_descents, pruned(exact(), outputs=("initial_logits",)))


def test_golden(update_golden: bool) -> None:
    at = pruned(exact(), layers=1, **OWN)
    assert_golden("early_descents", printed(optimized(early_descents, at).graph), update_golden)
