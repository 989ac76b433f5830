"""Who may look at whom: every spelling of the causal mask, windows, ALiBi and soft-caps; all else
is refused with its reason.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.spelled import (
    NEGATIVE,
    SDPA,
    Change,
    agree,
    back,
    calls_of,
    causal,
    counted,
    hidden_by,
    masked,
    merged,
    projections,
    refusal,
    written,
)
from tests.support.stages import inputs, numbers, stage
from tests.support.tolerances import SIMULATOR, error
from tests.support.toys import Toy, toy
from tintc.ir.dialect import argument, is_tint
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.embedding import embedding
from tintc.ir.ops.position import window_mask

LOW = torch.finfo(torch.float64).min

CAUSAL: dict[str, Toy] = {
    "is_causal": masked(lambda x: None, is_causal=True),  # type: ignore[arg-type, return-value]
    "boolean": masked(causal),
    "boolean of a batch": masked(lambda x: causal(x)[None, None].expand(x.shape[0], 1, -1, -1)),
    "comparison of positions": masked(lambda x: counted(x)[None, :] <= counted(x)[:, None]),
    "additive infinity": hidden_by(causal),
    "additive lowest number": masked(
        lambda x: torch.full((x.shape[1], x.shape[1]), LOW, dtype=torch.float64).triu(1)
    ),
    "additive -1e4": masked(lambda x: torch.where(causal(x), 0.0, -1e4).double()),
    "where": written(lambda s, x: torch.where(causal(x), s, NEGATIVE)),
    "masked_fill": written(lambda s, x: s.masked_fill(~causal(x), NEGATIVE)),
    "masked_fill with -1e4": written(lambda s, x: s.masked_fill(~causal(x)[None, None], -1e4)),
    "where the other way round": written(
        lambda s, x: torch.where(~causal(x), torch.tensor(LOW, dtype=s.dtype), s)
    ),
    "added": written(
        lambda s, x: (
            s + torch.zeros(x.shape[1], x.shape[1], dtype=s.dtype).masked_fill(~causal(x), NEGATIVE)
        )
    ),
    "subtracted": written(lambda s, x: s - 1e9 * (~causal(x)).to(s.dtype)),
    "added twice": written(
        lambda s, x: s.masked_fill(~causal(x), NEGATIVE) + torch.where(causal(x), 0.0, -1e9)
    ),
    "scaled behind the mask": written(lambda s, x: (s + torch.where(causal(x), 0.0, -1e9)) / 2),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks(name: str) -> None:
    (node,) = calls_of(agree(CAUSAL[name]), attention_forward)
    assert argument(node, "mask").name == "attention_mask"
    assert (argument(node, "bias"), argument(node, "softcap")) == (None, 0.0)
    assert argument(node, "scale") == pytest.approx(
        3**-0.5 / (2 if name == "scaled behind the mask" else 1), rel=1e-12
    )


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize(
    "form",
    [
        lambda w: masked(lambda x: causal(x) & (back(x) < w)),
        lambda w: masked(lambda x: causal(x).triu(1 - w)),
        lambda w: written(
            lambda s, x: s.masked_fill(~causal(x), NEGATIVE).masked_fill(back(x) >= w, NEGATIVE)
        ),
        lambda w: hidden_by(lambda x: (back(x) >= 0) & (back(x) < w)),
    ],
    ids=["boolean", "triu", "hidden twice", "additive"],
)
def test_windows_count_the_token_itself(form: Callable[[int], Toy], window: int) -> None:
    found = agree(form(window))
    (node,) = calls_of(found, attention_forward)
    assert is_tint(argument(node, "mask"), window_mask)
    assert argument(argument(node, "mask"), "window") == window
    assert argument(node, "bias") is None


def test_a_window_wider_than_what_was_looked_at_is_none() -> None:
    found = agree(masked(lambda x: causal(x) & (back(x) < 5000)), longest=None)
    assert not calls_of(found, window_mask)
    assert found.context.facts.longest == 4096


def slopes(count: int = 2) -> Tensor:
    return torch.tensor([0.25, 0.0625], dtype=torch.float64)[:count, None, None]


ALIBI: dict[str, Toy] = {
    "of the key": written(lambda s, x: s.masked_fill(~causal(x), NEGATIVE) + slopes() * counted(x)),
    "of the distance": written(
        lambda s, x: (s - slopes() * back(x)).masked_fill(~causal(x), NEGATIVE)
    ),
    "absolute distance": masked(
        lambda x: torch.where(causal(x), slopes() * -back(x).abs(), NEGATIVE)
    ),
    "from the last key": written(
        lambda s, x: (
            s + slopes() * (counted(x) - x.shape[1] + 1) + torch.where(causal(x), 0.0, NEGATIVE)
        )
    ),
    "in the mask": masked(lambda x: torch.where(causal(x), -slopes() * back(x), NEGATIVE)),
    "scaled with the scores": written(
        lambda s, x: (s + 3.0 * slopes() * counted(x)).masked_fill(~causal(x), NEGATIVE) / 3.0
    ),
    "of a batch and head": written(
        lambda s, x: (
            s.masked_fill(~causal(x), NEGATIVE)
            + (slopes() * torch.ones_like(counted(x)).cumsum(-1)).expand(x.shape[0], -1, -1, -1)
        )
    ),
    "the same for all heads": written(
        lambda s, x: s.masked_fill(~causal(x), NEGATIVE) + 0.125 * counted(x)[None]
    ),
    "nothing linear": written(
        lambda s, x: s.masked_fill(~causal(x), NEGATIVE) + (0.1 * counted(x).double()).sin()[None]
    ),
}


@pytest.mark.parametrize("name", ALIBI)
def test_biases_of_keys(name: str) -> None:
    found = agree(ALIBI[name], lengths=(1, 2, 7, 40))
    (node,) = calls_of(found, attention_forward)
    table = argument(node, "bias")
    assert is_tint(table, embedding)
    assert argument(table, "index").name == "position_ids"
    assert [tuple(t.shape) for t in found.context.tables.values()] == [(64, 2)]


def test_alibi_within_a_window() -> None:
    found = agree(
        masked(lambda x: torch.where(causal(x) & (back(x) < 4), -slopes() * back(x), NEGATIVE))
    )
    assert len(calls_of(found, window_mask)) == len(found.context.tables) == 1


CAPPED: dict[str, tuple[Change, float, float]] = {
    "cap": (lambda s, x: 2.0 * torch.tanh(s / 2.0), 3**-0.5, 2.0),
    "scaled between": (lambda s, x: 2.0 * torch.tanh(s / 0.5), 4.0 * 3**-0.5, 2.0),
    "bare tanh": (lambda s, x: torch.tanh(s), 3**-0.5, 1.0),
    "in place": (lambda s, x: torch.tanh(s.div(3.0)).mul(3.0), 3**-0.5, 3.0),
}


@pytest.mark.parametrize("name", CAPPED)
def test_soft_caps(name: str) -> None:
    change, scale, cap = CAPPED[name]
    (node,) = calls_of(
        agree(written(lambda s, x: change(s, x).masked_fill(~causal(x), NEGATIVE))),
        attention_forward,
    )
    assert argument(node, "scale") == pytest.approx(scale, rel=1e-12)
    assert argument(node, "softcap") == pytest.approx(cap, rel=1e-12)


NOT_CAUSAL = "its mask is not the causal one, nor a window of it"
REFUSED: dict[str, tuple[Toy, str]] = {
    "none": (masked(lambda x: None), "it is not causal: every position sees every other"),  # type: ignore[arg-type, return-value]
    "none, written out": (written(lambda s, x: s * 1.5), "it is not causal"),
    "prefix": (masked(lambda x: causal(x) | (counted(x)[None] < 3)), NOT_CAUSAL),
    "chunks": (
        masked(lambda x: causal(x) & (counted(x)[:, None] // 4 == counted(x)[None] // 4)),
        NOT_CAUSAL,
    ),
    "window and first tokens": (
        masked(lambda x: causal(x) & ((back(x) < 4) | (counted(x)[None] < 1))),
        NOT_CAUSAL,
    ),
    "not oneself": (masked(lambda x: (back(x) > 0) | (counted(x)[None] == 0)), NOT_CAUSAL),
    "every other": (masked(lambda x: causal(x) & (back(x) % 2 == 0)), NOT_CAUSAL),
    "to the future": (masked(lambda x: causal(x).T), NOT_CAUSAL),
    "one too far": (masked(lambda x: back(x) >= -1), NOT_CAUSAL),
    "a mild fill": (written(lambda s, x: s.masked_fill(~causal(x), -9.0)), "masked_fill"),
    "another for each head": (
        masked(lambda x: torch.stack([causal(x), causal(x).triu(-2)])),
        "its heads have different masks",
    ),
    "another for each head, additive": (
        hidden_by(lambda x: torch.stack([causal(x), causal(x).triu(-2)])),
        "its heads have different masks",
    ),
    "buckets of distance": (
        masked(lambda x: torch.where(causal(x), (back(x) // 3).double(), NEGATIVE)),
        "its bias is no sum of one for the query and one for the key",
    ),
    "capped behind the mask": (
        written(lambda s, x: torch.tanh(s.masked_fill(~causal(x), NEGATIVE))),
        "capped behind a mask",
    ),
    "capped twice": (
        written(lambda s, x: torch.tanh(torch.tanh(s)).masked_fill(~causal(x), NEGATIVE)),
        "twice",
    ),
    "sine of the scores": (
        written(lambda s, x: s.sin().masked_fill(~causal(x), NEGATIVE)),
        "aten.sin.default stands between",
    ),
    "scaled by position": (
        written(lambda s, x: s.masked_fill(~causal(x), NEGATIVE) * (1 + counted(x)[:, None])),
        "computes with its scores",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_the_rest_alone_and_says_why(name: str) -> None:
    model, reason = REFUSED[name]
    assert reason in refusal(model)


def test_masks_that_read_tokens_or_weights_are_refused() -> None:
    def attended(mask: Callable[[Toy, Tensor, Tensor], Tensor]) -> Toy:
        return toy(lambda m, x, ids: merged(SDPA(*projections(m, x), attn_mask=mask(m, x, ids))))

    for mask, reason in (
        (lambda m, x, ids: causal(x) & (ids != 3)[:, None, None], "the token ids"),
        (lambda m, x, ids: torch.where(causal(x), m.scale[0], NEGATIVE), "a weight"),
        (
            lambda m, x, ids: (
                torch.where(causal(x), 0.0, NEGATIVE) + x.mean((1, 2))[:, None, None, None]
            ),
            "a weight",
        ),
    ):
        assert f"its mask or bias depends on {reason}" in refusal(attended(mask))


@pytest.mark.slow
def test_attention_is_a_softmax_over_keys() -> None:
    def attended(probabilities: Callable[[Tensor, Tensor], Tensor]) -> Toy:
        def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
            q, k, v = projections(m, x)
            scores = (q @ k.transpose(-1, -2)).masked_fill(~causal(x), NEGATIVE)
            return merged(probabilities(scores, x) @ v)

        return toy(middle)

    agree(attended(lambda s, x: torch.softmax(s, -1)))
    agree(attended(lambda s, x: torch.softmax(s, 3)))
    assert "over axis 2; expected the last" in refusal(attended(lambda s, x: torch.softmax(s, 2)))
    assert "are not multiplied with values" in refusal(
        attended(lambda s, x: torch.softmax(s, -1) * 0.5)
    )
    assert "aten.sigmoid" in refusal(attended(lambda s, x: torch.sigmoid(s)))


FURTHER = {
    "full_like": written(lambda s, x: s + torch.full_like(s, NEGATIVE).triu(1)),
    "ones_like": written(lambda s, x: s.masked_fill(torch.ones_like(s).tril() == 0, NEGATIVE)),
    "minus the absolute distance": written(
        lambda s, x: s - slopes() * back(x).abs() + torch.where(causal(x), 0.0, NEGATIVE)
    ),
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_spellings(name: str) -> None:
    agree(FURTHER[name])


@pytest.mark.slow
def test_alibi_that_is_rounded_to_float32() -> None:
    """As every model in float32 computes it: slopes that are no powers of two round differently at
    each distance.
    """
    steep = torch.tensor([0.3, 0.7])[:, None, None]
    model = masked(lambda x: torch.where(causal(x), -steep * back(x), NEGATIVE).double())
    found, given = stage("refuse_unsupported", model=model), inputs(length=40)
    assert error(numbers(found, given), model(given["input_ids"])) < SIMULATOR[torch.float32]
