import pytest

from tests.support.stages import (
    apply,
    assert_golden,
    assert_same_numbers,
    before,
    flat,
    inputs,
    numbers,
    printed,
    stage,
)
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_backward_full, attention_forward
from tintc.ir.ops.embedding import embedding, segment, segment_mask
from tintc.ir.ops.linear import linear_backward, linear_forward
from tintc.ir.ops.norm import norm_backward


def config(steps: int = 1, layers: int | None = None) -> SimulatorConfig:
    return SimulatorConfig.exact(steps=steps, layers=layers, inner_lr=0.01)


def test_training_sees_the_segment_and_prediction_sees_all() -> None:
    found = stage("truncate_segment", config(2))
    for node in found.graph.nodes:
        if is_tint(
            node,
            attention_forward,
            attention_backward_full,
            linear_forward,
            linear_backward,
            norm_backward,
        ):
            tokens = (
                info(node).shape[0][1]
                if isinstance(info(node).shape[0], tuple)
                else info(node).shape[1]
            )
            assert tokens == ("T" if info(node).step == 2 else "S"), node.name


def test_what_is_shared_with_the_last_pass_stays_whole() -> None:
    found = stage("truncate_segment", config(1, layers=1))
    assert {info(n).shape[1] for n in found.graph.nodes if is_tint(n, embedding)} == {"T"}
    assert info(found.named("blocks_0_attention")).shape == ("B", "T", 6)
    assert info(found.named("blocks_1_attention")).shape == ("B", "S", 6)
    cuts = [n.args[0].name for n in found.graph.nodes if is_tint(n, segment, segment_mask)]
    assert sorted(cuts) == ["attention_mask", "blocks_0_residual_1", "loss_mask", "targets"]


def test_the_whole_sequence_changes_nothing() -> None:
    """With segment = T the pass is invisible."""
    for steps, layers in ((1, None), (2, 1)):
        assert_same_numbers("truncate_segment", config=config(steps, layers), limit=1e-13)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("layers", [1, None])
def test_the_shortest_segment_keeps_the_numbers(layers: int | None, steps: int) -> None:
    """The loss ends at position 3 of 7 tokens, so 4 tokens are enough for the same updates and
    final logits.
    """
    at, given = before("truncate_segment", config(steps, layers)), inputs()
    expected = flat(numbers(at, given))
    found = flat(numbers(apply("truncate_segment", at), {**given, "segment": 4}))
    assert found["initial_logits"].shape[1] == 4
    assert error(found["initial_logits"], expected["initial_logits"][:, :4]) < 1e-13
    assert all(
        error(found[name], expected[name]) < 1e-13 for name in expected if name != "initial_logits"
    )


def test_a_segment_that_is_too_short_shows() -> None:
    """So the test above compares something."""
    at, given = before("truncate_segment", config()), inputs()
    expected = flat(numbers(at, given))
    found = flat(numbers(apply("truncate_segment", at), {**given, "segment": 3}))
    assert error(found["logits"], expected["logits"]) > 1e-3


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "truncate_segment", printed(stage("truncate_segment", layers=1).graph), update_golden
    )
