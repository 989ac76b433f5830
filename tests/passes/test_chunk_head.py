"""The vocabulary head is taken in chunks where only its loss is wanted."""

from typing import Any

import pytest

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
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops import head
from tintc.ir.ops.linear import linear_forward
from tintc.passes.optimize.chunk_head import chunk_head
from tintc.passes.optimize.low_rank_updates import low_rank_updates


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", 50)


def capped(config: SimulatorConfig, **options: Any) -> Stage:
    """Gemma 2: its logits go through a soft-cap."""
    return pruned(config, model=FAMILIES["gemma2"].build(), longest=32, **options)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients(steps: int) -> None:
    at = pruned(exact(steps=steps))
    found = assert_same_results(chunk_head, at)
    assert len(calls(at, "loss_gradient")) == len(calls(found, "head_gradient")) == steps
    assert not calls(found, "loss_gradient")
    assert (
        len(
            [
                n
                for n in found.graph.nodes
                if info(n).shape[-1:] == (19,) and is_tint(n, linear_forward)
            ]
        )
        == 1
    )  # the wanted logits
    node = calls(found, "head_gradient")[0]
    assert [argument(node, name) for name in ("kind", "behind", "factors", "onednn")] == [
        "softmax",
        [],
        [],
        False,
    ]


def test_losses() -> None:
    """A call that wants losses only has no logits at all; before and after the update."""
    for outputs in (("losses",), ("losses", "initial_losses")):
        at = pruned(exact(), outputs=outputs)
        found = assert_same_results(chunk_head, at)
        assert len(calls(found, "head_losses")) == 1
        # The loss before the update is of the logits whose gradient is followed.
        together = "initial_losses" in outputs
        assert len(calls(found, "head_losses_and_gradient")) == together
        assert len(calls(found, "head_gradient")) == (not together)
        assert not calls(found, "token_losses")
        assert not [
            node
            for node in found.graph.nodes
            if info(node).shape[-1:] == (19,) and info(node).shape[:1] == ("B",)
        ]


@pytest.mark.slow
def test_what_stands_behind_the_head() -> None:
    at = capped(paper(), outputs=("losses",))
    found = assert_same_results(chunk_head, at)
    for name in ("head_gradient", "head_losses"):
        (node,) = calls(found, name)
        assert argument(node, "behind") == ["scale", "tanh", "scale"]
        assert argument(node, "factors") == [pytest.approx(1 / 3), 1.0, 3.0]


def test_leaves_a_call_that_is_differentiated() -> None:
    assert_left_alone(
        chunk_head, pruned(exact(), outputs=("logits", "losses"), differentiable=True)
    )


def test_leaves_logits_that_are_wanted_too() -> None:
    """The first step's are, where logits before the update are asked for; losses of the same logits
    read them, too.
    """
    found = assert_same_results(
        chunk_head, pruned(exact(steps=2), outputs=("logits", "initial_logits"))
    )
    assert len(calls(found, "head_gradient")) == len(calls(found, "loss_gradient")) == 1
    assert_left_alone(
        chunk_head,
        pruned(exact(), outputs=("logits", "initial_logits", "losses", "initial_losses")),
    )


def test_losses_and_gradient_of_the_same_logits() -> None:
    """As a window of a stream asks for them."""
    at = pruned(exact(), outputs=("initial_losses", "updates"))
    found = assert_same_results(chunk_head, at)
    assert len(calls(found, "head_losses_and_gradient")) == 1
    for name in ("linear_forward", "head_gradient", "head_losses", "loss_gradient"):
        assert not [n for n in calls(found, name) if info(n).shape[-1:] == (19,)]


def test_leaves_losses_without_a_head() -> None:
    """`mean_embedding` has no logits on the way back."""
    assert_left_alone(chunk_head, pruned(paper(loss_gradient="mean_embedding")))


def test_leaves_a_head_that_learns() -> None:
    """A weight of each sequence's own."""
    at = pruned(exact(), outputs=("losses",))
    build = Builder(at.graph)
    for node in [n for n in calls(at, "linear_forward") if info(n).shape[-1] == 19]:
        own = build.placeholder(
            f"{node.name}_own", ("B", *info(argument(node, "weight")).shape), role="input"
        )
        node.args = (node.args[0], own, *node.args[2:])
    assert_left_alone(chunk_head, at)


def test_leaves_a_first_order_difference_of_the_cap() -> None:
    """The way back through the head is exact in every preset; another form would not be what
    head_gradient computes.
    """
    at = capped(paper())
    caps = [
        n
        for n in calls(at, "activation_backward")
        if argument(n, "kind") == "tanh" and info(n).shape[-1] == 29
    ]
    assert [argument(node, "gradient") for node in caps] == ["exact"]
    caps[0].args = (*caps[0].args[:3], "first_order", 1000.0)
    assert_left_alone(chunk_head, at)


def test_leaves_gradients_that_something_else_reads() -> None:
    at = pruned(exact())
    (loss,) = calls(at, "loss_gradient")
    returned = at.graph.output_node().args[0]
    at.graph.output_node().args = ({**returned, "gradient": loss},)  # type: ignore[dict-item]
    assert_left_alone(chunk_head, at)


@pytest.mark.parametrize(
    "config",
    [paper(steps=2), paper(loss_gradient="quadratic"), exact(layers=1)],
    ids=["paper", "quadratic", "exact"],
)
def test_same_numbers(config: SimulatorConfig) -> None:
    assert_same_results(chunk_head, pruned(config, low_rank_updates))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "cohere"])  # a tied head; scaled logits
def test_same_numbers_of_other_models(name: str) -> None:
    assert_same_results(
        chunk_head, pruned(exact(), model=FAMILIES[name].build(), outputs=("losses",))
    )


def test_golden(update_golden: bool) -> None:
    at = pruned(paper(), low_rank_updates, layers=1, outputs=("losses",))
    assert_golden("chunk_head", printed(optimized(chunk_head, at).graph), update_golden)
