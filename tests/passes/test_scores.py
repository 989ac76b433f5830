"""From a softmax back to its product: what is done to scores adds up, whatever the order; and from
masks to a window and biases.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.spelled import NEGATIVE, back, causal, counted, written
from tests.support.stages import stage
from tintc.passes.analysis.coordinates import Untraceable
from tintc.passes.analysis.patterns import aten, calls
from tintc.passes.analysis.scores import Looks, _kept, _of_keys, _planes, read_looks, read_scores


def read(change):  # type: ignore[no-untyped-def]
    """(scores, context) of softmax(change(q k^T / sqrt 3, x)), up to 24 tokens."""
    found = stage("recognize_norm", model=written(change), longest=24)
    (softmax,) = [n for n in found.graph.nodes if calls(n, aten.softmax)]
    return read_scores(softmax, found.context), found.context


@pytest.mark.parametrize(
    ("change", "scale", "softcap", "factors", "hidden"),
    [
        (lambda s, x: s, 1.0, 0.0, [], 0),
        (lambda s, x: s * 2 / 8, 0.25, 0.0, [], 0),
        (lambda s, x: (s + back(x)) * 3, 3.0, 0.0, [3.0], 0),
        (lambda s, x: s * 3 - back(x), 3.0, 0.0, [-1.0], 0),
        (lambda s, x: ((s + back(x)) / 2 + back(x) * 5) / 4, 0.125, 0.0, [0.125, 0.25], 0),
        (lambda s, x: 5 * torch.tanh(s / 5), 1.0, 5.0, [], 0),
        (lambda s, x: 6 * torch.tanh(s * 2) / 3 + back(x), 4.0, 2.0, [1.0], 0),
        (
            lambda s, x: (
                s.masked_fill(~causal(x), NEGATIVE).masked_fill(back(x) > 3, NEGATIVE) + back(x)
            ),
            1.0,
            0.0,
            [1.0],
            2,
        ),
    ],
    ids=[
        "plain",
        "factors",
        "scaled offset",
        "subtracted",
        "two offsets",
        "cap",
        "cap of a multiple",
        "hidden twice",
    ],
)
def test_what_is_done_to_scores_adds_up(
    change, scale: float, softcap: float, factors: list[float], hidden: int
) -> None:  # type: ignore[no-untyped-def]
    scores, _ = read(change)
    assert scores.scale == pytest.approx(scale * 3**-0.5, rel=1e-12)
    assert scores.softcap == pytest.approx(softcap)
    assert sorted(factor for _, factor in scores.offsets) == pytest.approx(factors)
    assert (len(scores.hidden), scores.keys_last) == (hidden, True)


@pytest.mark.parametrize("window", [2, 5, 23])
def test_windows(window: int) -> None:
    assert read_looks(
        *_with_heads(lambda s, x: s.masked_fill((back(x) < 0) | (back(x) >= window), NEGATIVE))
    ) == Looks(window, None)


def _with_heads(change):  # type: ignore[no-untyped-def]
    scores, context = read(change)
    return scores, 2, context


def test_a_window_as_wide_as_all_is_none() -> None:
    assert (
        read_looks(
            *_with_heads(lambda s, x: s.masked_fill((back(x) < 0) | (back(x) >= 24), NEGATIVE))
        ).window
        == 0
    )


def test_biases_start_at_nothing_and_have_a_column_a_head() -> None:
    def change(s: Tensor, x: Tensor) -> Tensor:
        slopes = torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None, None]
        return (s + slopes * (counted(x) + 7)).masked_fill(~causal(x), NEGATIVE)

    looks = read_looks(*_with_heads(change))
    assert looks.bias is not None
    assert torch.allclose(
        looks.bias,
        torch.arange(24.0, dtype=torch.float64)[:, None]
        * torch.tensor([0.5, 2.0], dtype=torch.float64),
    )


nine = st.lists(st.floats(-3, 3), min_size=9, max_size=9)


@given(nine, nine, st.integers(2, 9), st.booleans())
def test_offsets_are_a_bias_of_keys_and_one_of_queries(
    of_keys: list[float], of_queries: list[float], window: int, masks: bool
) -> None:
    """What is added for the query alone changes no probability, so it may be anything."""
    key, query = (torch.tensor(values, dtype=torch.float64) for values in (of_keys, of_queries))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    seen = (distance >= 0) & (distance < window) if masks else torch.ones(9, 9, dtype=torch.bool)
    value = torch.where(seen, key[None, :] + query[:, None], NEGATIVE)
    (plane,) = _planes(value) * 2.0
    assert torch.equal(_kept(plane), seen)
    expected = 2 * (key - key[0]) if window > 1 or not masks else torch.zeros(9).double()
    assert torch.allclose(_of_keys(plane, seen), expected, atol=1e-9)


@given(st.integers(1, 8), st.integers(0, 8), st.floats(0.01, 3))
def test_an_offset_that_is_no_such_sum_is_refused(row: int, column: int, size: float) -> None:
    value = torch.where(
        torch.ones(9, 9, dtype=torch.bool).tril(), torch.arange(9.0).double(), NEGATIVE
    )
    value[row, column % row] += size
    with pytest.raises(Untraceable, match="no sum of one for the query and one for the key"):
        _of_keys(value, _kept(value))
