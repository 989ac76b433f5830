"""Updates stay factors for the slots that were chosen."""

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
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.elementwise import scale
from tintc.ir.ops.linear import bias_descent, linear_descent, linear_forward, prefix
from tintc.ir.ops.low_rank import concatenate, low_rank, low_rank_of_scores
from tintc.ir.ops.rates import sum_square
from tintc.passes.analysis.update_forms import Forms
from tintc.passes.optimize.low_rank_updates import low_rank_updates

CONFIGS = {
    "exact": exact(),
    "exact, 3 steps": exact(steps=3),
    "paper, 3 steps, top block": paper(steps=3, layers=1),
}


def products_of_updates(at: Stage) -> list[fx.Node]:
    products = [*calls(at, "linear_forward"), *calls(at, "linear_backward")]
    return [node for node in products if is_tint(argument(node, "weight"), linear_descent)]


def of_factors(at: Stage) -> list[fx.Node]:
    """Products with factors, by scores of their own or shared ones."""
    return [*calls(at, "low_rank"), *calls(at, "low_rank_of_scores")]


def learns_its_bias(product: fx.Node) -> bool:
    bias = argument(product, "bias") if is_tint(product, linear_forward) else None
    return bias is not None and is_tint(bias, bias_descent)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_weight_descends(config: SimulatorConfig) -> None:
    """Each product with an updated weight becomes one with the shared weight and one with
    factors.
    """
    at = pruned(config)
    found = optimized(low_rank_updates, at)
    assert len(of_factors(found)) == len(products_of_updates(at)) > 0
    assert not calls(found, "linear_descent")
    for node in of_factors(found):
        assert is_tint(argument(argument(node, "y"), "weight"), prefix)
        own = is_tint(node, low_rank)
        x = argument(node if own else argument(node, "scores"), "x")
        assert x is argument(node, "y").args[0]


def readers(at: Stage) -> list[int]:
    """Of each set of scores, how many products read it."""
    found = calls(at, "token_products")
    return sorted(len([n for n in node.users if is_tint(n, low_rank_of_scores)]) for node in found)


def test_layers_that_read_one_activation_share_scores() -> None:
    """Queries, keys and values, forward; gate and up of gated units; nothing else."""
    steps = 2
    config = exact(steps=steps)
    assert readers(optimized(low_rank_updates, pruned(config))) == [3] * 2 * steps
    gated = FAMILIES["llama"].build
    both = optimized(low_rank_updates, pruned(config, model=gated()))
    assert set(readers(both)) == {2, 3}
    values = optimized(low_rank_updates, pruned(paper(), model=gated()))
    assert set(readers(values)) == {2}
    assert not readers(optimized(low_rank_updates, pruned(paper())))


def test_half_precision_shares_none() -> None:
    """Scores for several readers are made in float32, which costs more than making them twice."""
    found = optimized(low_rank_updates, pruned(exact(steps=2), dtype=torch.bfloat16))
    assert calls(found, "low_rank") and not calls(found, "token_products")


def _of_steps(node: fx.Node) -> tuple[fx.Node, ...]:
    """The factors that stand side by side in it."""
    if not is_tint(node, concatenate):
        return (node,)
    parts: list[fx.Node] = node.args[0]  # type: ignore[assignment]
    return tuple(each for part in parts for each in _of_steps(part))


def test_factors_of_all_steps_so_far() -> None:
    """Concatenated once, oldest first, and shared by the products that read the same weight; those
    of three steps from those of two, so that each step's need not be kept beside them.
    """
    at, found = pruned(exact(steps=3)), optimized(low_rank_updates, pruned(exact(steps=3)))
    made = calls(found, "concatenate")
    parts = [_of_steps(node) for node in made]
    assert len(set(parts)) == len(parts)
    assert {len(part) for part in parts} == {2, 3}
    assert {len(node.args[0]) for node in made} == {2}
    assert {info(node).shape[1] for node in made} == {"2S", "3S"}
    assert all(
        [info(node).step for node in part] == sorted(info(node).step for node in part)
        for part in parts
    )
    forms = Forms(at.graph, with_rates=False)
    chains = {
        argument(node, "weight"): len(forms.of(argument(node, "weight")).terms)
        for node in products_of_updates(at)
    }
    assert set(chains.values()) == {1, 2, 3}
    assert not calls(optimized(low_rank_updates, pruned(exact(steps=1))), "concatenate")


def test_forward_and_backward_swap_keys_and_values() -> None:
    found = optimized(low_rank_updates, pruned(exact(steps=2)))
    seen = set()
    for node in calls(found, "low_rank"):
        forward = is_tint(argument(node, "y"), linear_forward)
        seen.add(forward)
        widths = [info(argument(node, name)).shape[-1] for name in ("x", "keys", "y", "values")]
        assert widths[0] == widths[1] and widths[2] == widths[3]
        assert argument(node, "with_bias") is False or forward
    assert seen == {True, False}


def test_biases_are_a_coordinate_of_the_scores() -> None:
    """Where they learn with the weight; norms' shifts stay as they are."""
    at = pruned(exact())
    found = optimized(low_rank_updates, at)
    learned = [node for node in products_of_updates(at) if learns_its_bias(node)]
    assert sum(argument(node, "with_bias") for node in of_factors(found)) == len(learned) > 0
    assert all(
        info(node).slot.endswith(("norm_1.bias", "ln_f.bias"))
        for node in calls(found, "bias_descent")
    )


def test_a_bias_with_gradients_of_its_own_stays() -> None:
    at = pruned(exact())
    product = next(node for node in products_of_updates(at) if learns_its_bias(node))
    descent = argument(product, "bias")
    with at.graph.inserting_before(descent):
        other = Builder(at.graph).call(
            scale,
            argument(descent, "dy"),
            0.5,
            like=descent,
            phase="descent",
            step=info(descent).step,
        )
    descent.args = (descent.args[0], other, *descent.args[2:])
    name = descent.name
    after = assert_same_results(low_rank_updates, at)
    kept = after.named(name)
    assert [argument(user, "bias") for user in kept.users] == [kept]


def test_leaves_slots_that_were_not_chosen() -> None:
    assert_left_alone(low_rank_updates, pruned(exact(steps=2), low_rank=frozenset()))
    one = "blocks.0.up.weight"
    at = pruned(exact(steps=2), low_rank=frozenset({one}))
    found = assert_same_results(low_rank_updates, at)
    slots = {info(argument(node, "weight")).slot for node in products_of_updates(at)}
    assert one in slots
    assert {info(argument(node, "weight")).slot for node in products_of_updates(found)} == slots - {
        one
    }


def test_updates_that_are_returned_are_materialized() -> None:
    """The descents stay for whoever wants their values; products use factors all the same."""
    at = pruned(exact(steps=2), outputs=("logits", "updates"))
    found = assert_same_results(low_rank_updates, at)
    assert not products_of_updates(found)
    assert len(calls(found, "linear_descent")) == len(calls(at, "linear_descent"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_same_numbers(config: SimulatorConfig) -> None:
    assert_same_results(low_rank_updates, pruned(config))


@pytest.mark.parametrize(
    "name", ["gpt2", "llama"]
)  # weights stored transposed; gated units without biases
def test_same_numbers_of_other_models(name: str) -> None:
    assert_same_results(low_rank_updates, pruned(exact(steps=2), model=FAMILIES[name].build()))


def test_a_call_that_is_differentiated() -> None:
    assert_same_results(low_rank_updates, pruned(exact(), differentiable=True))


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "low_rank_updates",
        printed(optimized(low_rank_updates, pruned(paper(steps=2, layers=1))).graph),
        update_golden,
    )


def test_products_of_gradients_are_made_once() -> None:
    """Sums of squares of later steps ask for those of earlier ones again, with other rates; layers
    that read one activation share the products of its tokens, and products with factors have made
    those of one step's tokens with another's.
    """
    at = pruned(exact(steps=3, max_drift=0.01, decay=0.1))
    found = assert_same_results(low_rank_updates, at)
    weights = {info(node).slot for node in calls(at, "linear_descent")}
    rows = 3 + 2  # <g_k, g_k>, and <g_k, g_j> of all earlier j
    assert len(calls(found, "gradient_products")) == rows * len(weights)
    products = [node.args for node in calls(found, "token_products")]
    assert len(set(products)) == len(products) < 2 * rows * len(weights)
    assert all(tuple(info(node).shape[:2]) == ("B", "T") for node in calls(found, "low_rank"))
    scored = calls(found, "low_rank_of_scores")
    assert {info(node).phase for node in scored} == {"forward", "backward"}
    squares = {user for node in calls(found, "gradient_products") for user in node.users}
    read_twice = [node for node in scored if len(argument(node, "scores").users) > 1]
    assert len(read_twice) > len(scored) / 2
    assert {node.target for node in squares} == {sum_square.target}
    for node in calls(found, "change_square"):  # biases and gains are as they were
        assert len(info(node.args[1]).shape) == 1  # type: ignore[arg-type]


def test_scores_are_made_for_products_alone_without_a_limit() -> None:
    found = optimized(low_rank_updates, pruned(exact(steps=3, decay=0.1)))
    assert calls(found, "low_rank")
    assert not calls(found, "gradient_products")
