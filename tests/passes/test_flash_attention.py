"""torch's kernel for the way back through the scores, where it applies."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

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
from tests.support.spelled import heads, merged
from tests.support.stages import Stage, assert_golden, printed
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument
from tintc.passes.optimize.causal_attention import causal_attention
from tintc.passes.optimize.flash_attention import flash_attention


def masked_away(config: SimulatorConfig, **options: Any) -> Stage:
    return pruned(config, causal_attention, **options)


@pytest.mark.parametrize("steps", [1, 3])
def test_takes_the_kernel_where_it_goes_back(steps: int) -> None:
    """The last forward pass has no way back and keeps its kernel."""
    found = optimized(flash_attention, masked_away(exact(steps=steps)))
    assert len(calls(found, "flash_forward")) == len(calls(found, "flash_backward")) == 2 * steps
    assert len(calls(found, "attention_forward")) == 2
    assert not calls(found, "attention_backward_full")


def test_each_way_back_reads_its_own_way_there() -> None:
    for backward in calls(
        optimized(flash_attention, masked_away(exact(steps=2))), "flash_backward"
    ):
        forward = argument(backward, "o").args[0]
        assert argument(backward, "sums").args == (forward, 1)
        assert [argument(backward, name) for name in ("q", "k", "v")] == [
            argument(forward, name) for name in ("q", "k", "v")
        ]


@pytest.mark.parametrize(
    "facts",
    [{"differentiable": True}, {"device": "cuda"}, {"causal": False}],
    ids=["differentiable", "cuda", "another mask"],
)
def test_leaves_calls_that_the_kernel_is_not_for(facts: dict[str, Any]) -> None:
    assert_left_alone(flash_attention, masked_away(exact(), **facts))


def test_leaves_value_only_attention() -> None:
    assert_left_alone(flash_attention, masked_away(paper()))


@pytest.mark.parametrize("name", ["mpt", "bloom"])
def test_leaves_alibi(name: str) -> None:
    assert_left_alone(flash_attention, masked_away(exact(), model=FAMILIES[name].build()))


def test_leaves_soft_caps() -> None:
    at = masked_away(exact(), model=FAMILIES["gemma2"].build(), longest=32)
    assert None in [argument(node, "mask") for node in calls(at, "attention_backward_full")]
    assert_left_alone(flash_attention, at)


class WideValues(nn.Module):
    """Heads of v twice as wide as those of q and k."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(
            heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), is_causal=True
        )
        return x + self.out(merged(y))


def test_leaves_heads_of_two_sizes() -> None:
    """torch's kernel refuses them."""
    at = masked_away(
        exact(),
        model=nn.Sequential(
            nn.Embedding(19, 8), nn.Sequential(WideValues()), nn.Linear(8, 19)
        ).double(),
    )
    assert calls(at, "attention_backward_full")
    assert_left_alone(flash_attention, at)


@pytest.mark.parametrize("name", ["opt", "llama", "falcon"])  # falcon: one key/value head
@pytest.mark.slow
def test_same_numbers(name: str) -> None:
    assert_same_results(flash_attention, masked_away(exact(steps=2), model=FAMILIES[name].build()))


@pytest.mark.parametrize("outputs", [("logits", "initial_logits"), ("updates",)])
def test_same_numbers_of_other_outputs(outputs: tuple[str, ...]) -> None:
    assert_same_results(flash_attention, masked_away(exact(steps=2, layers=1), outputs=outputs))


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "flash_attention",
        printed(optimized(flash_attention, masked_away(exact(), layers=1)).graph),
        update_golden,
    )
