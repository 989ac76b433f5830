"""Loss at the positions that carry it: head and way back run there alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.models import opt
from tests.support.optimized import (
    LIMIT,
    assert_left_alone,
    calls,
    exact,
    optimized,
    paper,
    pruned,
    results,
)
from tests.support.stages import Stage, assert_golden, inputs, printed
from tests.support.tolerances import error
from tintc.ir.dialect import argument
from tintc.ir.node_meta import info
from tintc.passes.optimize.kept_first import kept_first
from tintc.passes.optimize.scored_loss import scored_loss

SCORED = (1, 3)  # of the four tokens that training passes see


def known(at: Stage) -> dict[str, Any]:
    found: dict[str, Any] = dict(inputs(batch=3, vocab=at.context.facts.vocab_size))
    mask: Tensor = torch.zeros_like(found["loss_mask"])
    mask[:, SCORED[0]], mask[0, SCORED[1]] = 1, 1
    return {**found, "loss_mask": mask, "scored": torch.tensor(SCORED)}


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (exact(steps=2), None),
        (paper(steps=2, layers=1), None),
        (exact(loss_gradient="quadratic"), None),
        (exact(train="*"), opt),  # a tied head learns too
        (exact(optimizer="adam"), opt),
        (paper(clip_norm=0.1), opt),
    ],
)
def test_same_numbers(config: Any, model: Any) -> None:
    """And with what kept_first makes of it."""
    made = None if model is None else model()
    at = pruned(config, model=made, outputs=("logits", "updates"), scored=True)
    narrow = optimized(scored_loss, at)
    given = known(at)
    expected = results(at, given)
    for after in (narrow, optimized(kept_first, narrow)):
        found = results(after, given)
        assert set(found) == set(expected)
        assert {k: e for k in found if not (e := error(found[k], expected[k])) < LIMIT} == {}
    losses = calls(narrow, "loss_gradient")
    assert len(losses) == config.steps
    assert all(info(node).shape[1] == "L" for node in losses)
    assert len(calls(narrow, "spread_tokens")) == len(losses)


def test_the_way_back_through_the_last_block_begins_there() -> None:
    at = optimized(scored_loss, pruned(exact(), scored=True, outputs=("updates",)))
    after = optimized(kept_first, at)
    top, below = calls(after, "attention_backward_full")
    assert info(argument(top, "q")).shape[1] == "L"
    assert info(argument(top, "k")).shape[1] == info(argument(below, "q")).shape[1] == "S"


def test_leaves() -> None:
    """Loss that may stand everywhere, logits that are wanted too, calls that train nothing."""
    assert_left_alone(scored_loss, pruned(exact()))
    both = ("logits", "initial_logits")
    assert_left_alone(scored_loss, pruned(exact(), outputs=both, scored=True))
    assert_left_alone(scored_loss, pruned(exact(), from_updates=True, scored=True))
    plain = pruned(paper(loss_gradient="mean_embedding"), scored=True)
    assert_left_alone(scored_loss, plain)  # it has no logits


def test_golden(update_golden: bool) -> None:
    at = pruned(paper(), scored=True)
    assert_golden("scored_loss", printed(optimized(scored_loss, at).graph), update_golden)
