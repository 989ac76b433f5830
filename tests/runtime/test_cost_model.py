"""Which updates stay factors: what a graph says of a slot's uses, and the costs that are
compared.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.stages import stage
from tintc.ir.calibration import OPERATIONS_PER_BYTE, fixed
from tintc.ir.config import SimulatorConfig
from tintc.runtime.specialize.cost_model import SlotUse, slot_uses

UP, DOWN = "blocks.1.up.weight", "blocks.1.down.weight"


def uses(config: SimulatorConfig) -> dict[str, SlotUse]:
    return slot_uses(stage("verify", config).graph)


def test_one_step() -> None:
    """The updated weight is read once, by the last forward pass, which sees the whole sequence."""
    found = uses(SimulatorConfig.exact())
    assert found[UP] == SlotUse(10, 6, 1, ((True, 1),))
    assert found[DOWN] == SlotUse(6, 10, 1, ((True, 1),))
    assert found["blocks.0.attention.qkv.weight[0:6]"] == SlotUse(6, 6, 1, ((True, 1),))


def test_three_steps() -> None:
    """Training passes in between see the segment, forward and back."""
    found = uses(SimulatorConfig.exact(steps=3))
    assert found[UP].descents == 3
    assert found[UP].reads == ((False, 1), (False, 1), (False, 2), (False, 2), (True, 3))


def test_sums_of_squares() -> None:
    """By factors they cost a product of tokens for each pair of steps, by own weights a pass."""
    use = uses(SimulatorConfig.exact(steps=3, max_drift=0.1))[UP]
    plain = uses(SimulatorConfig.exact(steps=3))[UP]
    assert use.squares == 1 + 2 + 3
    assert use.passes == 2 * 3  # the square, and the way back
    for segment in (1, 5, 50):
        low_rank, own = (replace(use, **{field: 0}) for field in ("passes", "squares"))
        assert low_rank.factors_win(64, segment, 4, fixed("cpu")) <= plain.factors_win(
            64, segment, 4, fixed("cpu")
        )
        assert plain.factors_win(64, segment, 4, fixed("cpu")) <= own.factors_win(
            64, segment, 4, fixed("cpu")
        )


def test_only_weights_that_learn() -> None:
    """Weights of linear layers in trained blocks; `paper` leaves q and k alone."""
    assert {name.split(".")[1] for name in uses(SimulatorConfig.exact(layers=1))} == {"1"}
    exact, paper = uses(SimulatorConfig.exact()), uses(SimulatorConfig.paper())
    assert set(exact) - set(paper) == {
        f"blocks.{block}.attention.qkv.weight[{rows}]"
        for block in (0, 1)
        for rows in ("0:6", "6:12")
    }
    assert not [name for name in exact if "norm" in name or "bias" in name or "head" in name]


def by_hand(use: SlotUse, tokens: int, segment: int, element_bytes: int, device: str) -> bool:
    factors = 0
    for (
        whole,
        k,
    ) in use.reads:  # scores of each token with k * segment keys, then a sum of as many values
        factors += 2 * (tokens if whole else segment) * (k * segment) * use.columns
        factors += 2 * (tokens if whole else segment) * (k * segment) * use.rows
    descent = (
        2 * segment * use.rows * use.columns
        + 2 * use.rows * use.columns * element_bytes * OPERATIONS_PER_BYTE[device]
    )
    return factors < use.descents * descent


@given(
    *(st.integers(1, 5000) for _ in range(2)),
    st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=5),
    *(st.integers(1, 3000) for _ in range(2)),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["cpu", "cuda"]),
)
def test_costs(
    rows: int,
    columns: int,
    reads: list[tuple[bool, int]],
    tokens: int,
    segment: int,
    size: int,
    device: str,
) -> None:
    use = SlotUse(rows, columns, max([1, *(k for _, k in reads)]), tuple(reads))
    assert use.factors_win(tokens, segment, size, fixed(device)) is by_hand(
        use, tokens, segment, size, device
    )


@pytest.mark.parametrize(
    ("side", "tokens", "segment", "expected"),
    [
        (768, 256, 127, True),
        (4096, 256, 127, True),
        (768, 2048, 1023, False),
        (768, 2048, 15, True),
        (64, 256, 127, False),
    ],
)
def test_few_training_tokens_and_large_weights(
    side: int, tokens: int, segment: int, expected: bool
) -> None:
    """One step of a square weight in float32 on a CPU."""
    assert (
        SlotUse(side, side, 1, ((True, 1),)).factors_win(tokens, segment, 4, fixed("cpu"))
        is expected
    )


def test_a_device_without_figures_counts_as_an_accelerator() -> None:
    use = SlotUse(64, 64, 1, ((True, 1),))
    for tokens in (16, 64, 256, 1024):
        assert use.factors_win(tokens, tokens // 2, 2, fixed("xpu")) is use.factors_win(
            tokens, tokens // 2, 2, fixed("cuda")
        )
