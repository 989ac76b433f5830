"""The causal mask goes where it is the only one."""

import pytest
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
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.position import window_mask
from tintc.passes.optimize.causal_attention import causal_attention

KERNELS = ("attention_forward", "attention_backward_value", "attention_backward_full")


def masks(at: Stage) -> list[fx.Node | None]:
    return [argument(node, "mask") for name in KERNELS for node in calls(at, name)]


@pytest.mark.parametrize("config", [exact(steps=2), paper()], ids=["exact", "paper"])
def test_takes_the_mask_away(config: SimulatorConfig) -> None:
    """The whole sequence's and the segment's; nothing reads the input any more."""
    at = pruned(config)
    assert len(set(masks(at))) == 2
    assert None not in masks(at)
    found = optimized(causal_attention, at)
    assert masks(found) == [None] * len(masks(at))
    assert not calls(found, "segment_mask")
    assert not found.named("attention_mask").users


def test_leaves_other_masks() -> None:
    """A call with padding or a mask of its own."""
    assert_left_alone(causal_attention, pruned(exact(), causal=False))


def test_leaves_alibi() -> None:
    """The kernels combine a bias with a mask."""
    at = pruned(exact(), model=FAMILIES["mpt"].build())
    assert all(argument(node, "bias") is not None for node in calls(at, "attention_forward"))
    assert_left_alone(causal_attention, at)


@pytest.mark.slow
def test_leaves_windows() -> None:
    """Gemma 2 looks through a window in every other block only."""
    at = pruned(exact(), model=FAMILIES["gemma2"].build(), longest=32)
    windows = [
        mask
        for mask in masks(at)
        if any(is_tint(node, window_mask) for node in (mask, *mask.all_input_nodes))
    ]
    found = assert_same_results(causal_attention, at)
    assert 0 < len(windows) < len(masks(at))
    assert sum(mask is not None for mask in masks(found)) == len(windows)


@pytest.mark.parametrize("name", ["opt", "llama", "falcon"])
def test_same_numbers(name: str) -> None:
    assert_same_results(causal_attention, pruned(exact(steps=2), model=FAMILIES[name].build()))
    assert_same_results(causal_attention, pruned(paper(layers=1), model=FAMILIES[name].build()))


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "causal_attention",
        printed(optimized(causal_attention, pruned(paper(), layers=1)).graph),
        update_golden,
    )
