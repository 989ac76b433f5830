"""Models that were misread, or that ended in an error of ours."""

import math

import pytest
import torch
from torch import Tensor, nn

import tintc
from tests.oracle.compare import assert_equals_reference
from tests.support.decoders import (
    HEADS,
    HIDDEN,
    VOCAB,
    Decoder,
    FeedForward,
    MaskedAttention,
    heads,
)
from tests.support.models import ragged_train_mask, tokens
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UnsupportedModelError


class LateValues(MaskedAttention):
    """Values are projected behind the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, _ = (heads(y, HEADS) for y in self.c_attn(x).split(hidden, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = att.softmax(-1) @ heads(self.values(x), HEADS)
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, hidden))
        return out


class WindowOfLongTexts(MaskedAttention):
    """A window of 4 for texts of more than 20 tokens, none for shorter ones."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        place = torch.arange(length)
        back = place[:, None] - place[None]
        window = torch.where(place[-1:] >= 20, 4, 10**6)
        q, k, v = (heads(y, HEADS) for y in self.c_attn(x).split(hidden, dim=2))
        seen = (back >= 0) & (back < window)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, length, hidden))
        return out


class Positions(nn.Module):
    """What is added to the tokens: positions, scaled by a learned number or normalised."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = Decoder(MaskedAttention, FeedForward, positions="")
        self.table, self.norm = nn.Embedding(32, HIDDEN), nn.LayerNorm(HIDDEN)
        self.alpha, self.kind = nn.Parameter(torch.tensor(0.5)), kind

    def forward(self, input_ids: Tensor) -> Tensor:
        place = self.table(torch.arange(input_ids.shape[1]))
        added = self.norm(place) if self.kind == "normalised" else place * self.alpha
        x = self.inner.tok(input_ids) + added
        for layer in self.inner.layers:
            x = layer(x)
        logits: Tensor = self.inner.head(self.inner.norm(x))
        return logits


def test_values_behind_the_softmax() -> None:
    torch.manual_seed(2)
    assert_equals_reference(
        Decoder(LateValues, FeedForward).double().eval(),
        SimulatorConfig.exact(inner_lr=0.01),
        input_ids=tokens(2, 9, VOCAB),
        train_mask=ragged_train_mask(2, 9),
    )


@pytest.mark.slow
def test_a_mask_that_changes_between_lengths() -> None:
    """It was looked at for three lengths, of which two had the window."""
    model = Decoder(WindowOfLongTexts, FeedForward).double().eval()
    for islands, reason in (("refuse", "its mask or bias depends on"), ("allow", "it depends on")):
        with pytest.raises(UnsupportedModelError, match=f"{reason} the length"):
            tintc.compile(model, islands=islands)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["normalised", "scaled"])
def test_positions_that_are_computed_with(kind: str) -> None:
    model = Positions(kind).double().eval()
    with pytest.raises(UnsupportedModelError, match="cannot simulate this model"):
        tintc.compile(model, islands="refuse")
    tintc.compile(model, check="step")
