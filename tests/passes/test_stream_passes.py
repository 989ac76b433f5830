"""The passes of a stream's windows: what they change, and that they change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.models import opt
from tests.support.optimized import (
    LIMIT,
    Stage,
    assert_same_results,
    calls,
    exact,
    optimized,
    pruned,
    results,
)
from tests.support.stages import inputs
from tests.support.tolerances import error
from tintc.ir.builder import Builder
from tintc.ir.dialect import argument
from tintc.ir.node_meta import info
from tintc.ir.ops.elementwise import residual
from tintc.passes.stream.cached_keys import cached_keys
from tintc.passes.stream.loss_at_kept import loss_at_kept
from tintc.passes.stream.whole_segment import whole_segment

FIRST = 3  # tokens without a target


def of_a_window(**facts: Any) -> Stage:
    """A graph whose training passes see all tokens."""
    outputs = ("initial_losses", "updates")
    return optimized(whole_segment, pruned(outputs=outputs, **facts))


def known(vocab: int) -> dict[str, Any]:
    found: dict[str, Any] = dict(inputs(batch=3, vocab=vocab))
    mask: Tensor = found["loss_mask"].clone()
    mask[:, :FIRST], mask[:, FIRST] = 0, 1
    return {**found, "loss_mask": mask, "kept": torch.arange(FIRST, mask.shape[1])}


def test_whole_segment() -> None:
    at = pruned(exact(steps=2), outputs=("initial_losses", "updates"))
    found = assert_same_results(whole_segment, at)
    assert calls(at, "segment") and not calls(found, "segment")
    assert not calls(found, "segment_mask")


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (exact(steps=2), None),
        (exact(loss_gradient="quadratic"), None),
        (exact(train="*"), opt),  # a tied head learns too
        (exact(optimizer="adam"), opt),
    ],
)
def test_loss_at_kept(config: Any, model: Any) -> None:
    at = of_a_window(config=config, model=None if model is None else model())
    after = optimized(loss_at_kept, at)
    given = known(at.context.facts.vocab_size)
    expected, found = results(at, given), results(after, given)
    assert set(found) == set(expected)
    losses = "initial_losses"
    assert error(found.pop(losses), expected.pop(losses)[:, FIRST:]) < LIMIT
    assert {
        name: e for name in found if not (e := error(found[name], expected[name])) < LIMIT
    } == {}
    gradients = calls(after, "loss_gradient")
    assert gradients and all(info(node).shape[1] == "K" for node in gradients)
    assert len(calls(after, "spread_tokens")) == len(gradients)


def test_losses_of_logits_that_no_layer_makes_are_taken_at_kept_tokens() -> None:
    at = of_a_window(config=exact())
    (losses,) = calls(at, "token_losses")
    logits = argument(losses, "logits")
    with at.graph.inserting_before(losses):
        twice = Builder(at.graph).call(residual, logits, logits, phase="forward", step=0)
    losses.args = (twice, losses.args[1])
    after, given = optimized(loss_at_kept, at), known(19)
    (losses,) = calls(after, "token_losses")
    assert [info(node).shape[1] for node in losses.all_input_nodes] == ["K", "K"]
    expected, found = (results(each, given)["initial_losses"] for each in (at, after))
    assert error(found, expected[:, FIRST:]) < LIMIT


def test_cached_keys_of_no_tokens() -> None:
    """With P = 0 nothing changes; more is tested by streams (tests/runtime/test_streaming.py)."""
    at = of_a_window(config=exact(steps=2), causal=False)
    after = optimized(cached_keys, at)
    given = known(at.context.facts.vocab_size)
    sizes = {node.name: info(node).shape for node in after.graph.nodes if node.op == "placeholder"}
    past = {
        name: torch.zeros(3, 0, *(size for size in shape[2:] if isinstance(size, int)))
        for name, shape in sizes.items()
        if shape[1:2] == ("P",)
    }
    assert len(past) == 2 * 2  # keys and values of two blocks, for all steps
    expected, found = results(at, given), results(after, {**given, **past})
    assert {
        name: e for name in expected if not (e := error(found[name], expected[name])) < LIMIT
    } == {}
    joined = calls(after, "with_past")
    assert {info(node).step for node in joined} == {0, 1}
    assert all(info(node).shape[1] == "C" for node in joined)
