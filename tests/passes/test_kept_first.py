"""What is wanted at some positions alone is computed at these alone."""

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
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.embedding import kept_tokens
from tintc.ir.ops.linear import linear_forward
from tintc.passes.optimize.kept_first import kept_first
from tintc.passes.stream.loss_at_kept import loss_at_kept
from tintc.passes.stream.whole_segment import whole_segment

FIRST = 3  # positions before the kept ones


def same(at: Stage, given: dict[str, Any] | None = None) -> Stage:
    """The graph after the pass, which changed it, and no number."""
    after = optimized(kept_first, at)
    assert printed(after.graph) != printed(at.graph)
    known = kept(at) if given is None else given
    expected, found = results(at, known), results(after, known)
    assert set(found) == set(expected)
    assert {key: e for key in expected if not (e := error(found[key], expected[key])) < LIMIT} == {}
    return after


def kept(at: Stage) -> dict[str, Any]:
    found: dict[str, Any] = dict(inputs(batch=3, vocab=at.context.facts.vocab_size))
    return {**found, "kept": torch.arange(FIRST, found["input_ids"].shape[1])}


def of_last(at: Stage, step: int) -> list[Any]:
    """Products of the last forward pass that have a value for every token."""
    return [
        node
        for node in calls(at, "linear_forward")
        if info(node).step == step and info(node).shape[1] == "T"
    ]


@pytest.mark.parametrize("config", [exact(steps=2), paper(layers=1)], ids=["exact", "paper"])
def test_the_last_block_keeps_keys_and_values(config: Any) -> None:
    at = pruned(config, some_tokens=True)
    after = same(at)
    last = [node for node in calls(after, "attention_forward") if info(node).step == config.steps][
        -1
    ]
    assert info(argument(last, "q")).shape[1] == info(last).shape[1] == "K"
    assert info(argument(last, "k")).shape[1] == info(argument(last, "v")).shape[1] == "T"
    assert info(argument(last, "mask")).shape[2:] == ("K", "T")
    gone = len(of_last(at, config.steps)) - len(of_last(after, config.steps))
    assert gone == 4  # the queries, the output, and both layers behind it


def test_the_block_below_computes_what_keys_need() -> None:
    config = exact()
    after = optimized(kept_first, pruned(config, some_tokens=True, layers=3))
    attention = [n for n in calls(after, "attention_forward") if info(n).step == 1]
    assert [info(node).shape[1] for node in attention] == ["T", "T", "K"]


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (exact(steps=2), None),
        (paper(steps=2), None),
        (exact(loss_gradient="quadratic", momentum=0.5, steps=2), None),
        (exact(train="*"), opt),  # a tied head learns too
        (exact(optimizer="adam"), opt),
        (paper(clip_norm=0.1), opt),
    ],
)
def test_a_window_goes_back_from_its_targets(config: Any, model: Any) -> None:
    at = pruned(config, model=None if model is None else model(),
                outputs=("initial_losses", "updates"))  # fmt: skip
    at = optimized(loss_at_kept, optimized(whole_segment, at))
    known = kept(at)
    mask: Tensor = known["loss_mask"].clone()
    mask[:, :FIRST], mask[:, FIRST] = 0, 1
    after = same(at, {**known, "loss_mask": mask})
    full = config.attention_gradient == "full"
    back = calls(after, "attention_backward_full" if full else "attention_backward_value")
    top = next(node for node in back if info(node).step == 0)  # the first on the way back
    assert info(argument(top, "do")).shape[1] == info(argument(top, "q")).shape[1] == "K"
    assert info(argument(top, "k")).shape[1] == "T"
    block = info(top).module.rpartition(".")[0]
    of_top = [
        node
        for node in calls(after, "linear_descent")
        if info(node).module.startswith(block) and info(node).step == 0
    ]
    tokens = sorted(str(info(argument(node, "dy")).shape[1]) for node in of_top)
    whole = [n for n in calls(after, "linear_forward") if info(n).module.startswith(block)]
    assert {info(n).shape[1] for n in whole if info(n).step == 0} == {"K", "T"}
    assert len([n for n in whole if info(n).step == 0 and info(n).shape[1] == "T"]) == 2
    # keys and values learn from all tokens, all else from those that have a target
    assert tokens == (["K"] * 4 + ["T"] * 2 if full else ["K"] * 3 + ["T"])


def test_what_others_read_stays() -> None:
    """Logits before any update are of a pass that also trains: of it the head alone is narrow."""
    at = pruned(exact(), some_tokens=True, outputs=("logits", "initial_logits"))
    after = optimized(kept_first, at)
    first = [n for n in calls(after, "attention_forward") if info(n).step == 0]
    assert all(info(node).shape[1] == "S" for node in first)
    narrow = [n for n in calls(after, "kept_tokens") if info(n).step == 0 and info(n).shape[-1] > 1]
    assert len(narrow) == len([n for n in calls(at, "kept_tokens") if info(n).step == 0])


def test_leaves() -> None:
    """Calls of all positions, and windows of which all tokens are kept."""
    assert_left_alone(kept_first, pruned(exact()))
    cached = pruned(exact(), outputs=("initial_losses",), window=True, cached=True, causal=False)
    assert calls(cached, "kept_tokens")
    assert_left_alone(kept_first, cached)


def test_a_product_that_two_layers_read_at_kept_positions_is_made_once() -> None:
    after = optimized(kept_first, pruned(exact(), some_tokens=True))
    of = [argument(node, "x") for node in calls(after, "kept_tokens")]
    assert len(of) == len(set(of))
    assert not [n for n in of if is_tint(n, linear_forward, attention_forward, kept_tokens)]


def test_golden(update_golden: bool) -> None:
    after = optimized(kept_first, pruned(paper(), some_tokens=True))
    assert_golden("kept_first", printed(after.graph), update_golden)
