"""Models that cannot be simulated are refused, and the operators that are to blame are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.sym_node import SymNode

from tests.support.families import BASE, COHERE, GROUPED, STABLELM, builder
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import capture
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UnsupportedModelError

EXPERTS = {
    **GROUPED,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
RECURRENT = {**BASE, "hidden_size": 12}

REFUSED = {
    "mixtral": (builder("mixtral", **EXPERTS), ("aten.topk", "aten.bmm", "mlp.gate")),
    "qwen2_moe": (builder("qwen2_moe", **EXPERTS), ("aten.topk", "mlp.gate")),
    "gpt_oss": (builder("gpt_oss", **GROUPED), ("aten.cat", "self_attn")),
    "mamba": (
        builder("mamba", **RECURRENT, state_size=4),
        ("loops over the tokens", "modeling_mamba.py", "backbone.layers.0.mixer"),
    ),
    "rwkv": (
        builder("rwkv", **RECURRENT),
        ("loops over the tokens", "modeling_rwkv.py", "blocks.0.attention"),
    ),
    "recurrent_gemma": (
        builder("recurrent_gemma", **{**GROUPED, "num_hidden_layers": 3}),
        ("loops over the tokens", "modeling_recurrent_gemma.py", "rg_lru"),
    ),
    "norms of single heads": (
        builder("stablelm", **STABLELM, qk_layernorm=True),
        ("aten.cat", "q_layernorm", "several activations"),
    ),
    "gains of single heads": (
        builder("cohere", **COHERE, use_qk_norm=True),
        ("aten.mul", "q_norm"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.slow
def test_operators_are_named(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    build, expected = REFUSED[name]
    model = build()
    capfd.readouterr()
    with pytest.raises(UnsupportedModelError) as refusal:
        lower(capture(model), SimulatorConfig.paper(), islands="refuse")
    assert all(part in str(refusal.value) for part in expected), str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr().out == ""


class Recurrent(nn.Module):
    """A recurrent layer between an embedding and a head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.tokens, self.layer, self.head = (
            nn.Embedding(29, 8),
            kind(8, 8, batch_first=True),
            nn.Linear(8, 29),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.layer(self.tokens(input_ids))[0]
        logits: Tensor = self.head(hidden)
        return logits


@pytest.mark.parametrize(
    ("kind", "operator"), [(nn.GRU, "aten.gru"), (nn.LSTM, "aten.lstm"), (nn.RNN, "aten.rnn_tanh")]
)
def test_recurrent_layers_are_named(
    kind: type[nn.RNNBase], operator: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{operator}.* x1 in layer"):
        capture(Recurrent(kind).eval())
    assert capfd.readouterr() == ("", "")


class Decaying(nn.Module):
    """A running sum that forgets, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(29, 8), nn.Linear(8, 29)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = 0.5 * state + x[:, t].tanh()  # the line that is named
            states.append(state)
        logits: Tensor = self.head(torch.stack(states, 1))
        return logits


def test_a_loop_over_tokens_is_named_with_its_line() -> None:
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "# the line that is named" in text)
    with pytest.raises(UnsupportedModelError) as caught:
        capture(Decaying().eval())
    assert f"loops over the tokens in Python, at test_refused_families.py:{line} in the model" in (
        str(caught.value)
    )


def test_a_length_that_becomes_a_number_is_named() -> None:
    """Its line; what torch itself says holds only which size it was."""

    class Listed(Recurrent):
        def forward(self, input_ids: Tensor) -> Tensor:
            back = torch.tensor(list(range(input_ids.shape[1]))[::-1])
            logits: Tensor = self.head(self.tokens(input_ids) + back[:, None])
            return logits

    line = Listed.forward.__code__.co_firstlineno + 1
    before = SymNode.guard_int
    with pytest.raises(
        UnsupportedModelError,
        match=rf"Constraints violated .*, at test_refused_families.py:{line} in the model ",
    ):
        capture(Listed(nn.GRU).eval())
    assert SymNode.guard_int is before


class Choosing(nn.Module):
    """Chooses by its tokens what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(29, 8), nn.Linear(8, 29)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        if input_ids.max() > 20:
            x = x.tanh()
        logits: Tensor = self.head(x)
        return logits


def test_what_depends_on_the_tokens_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing of torch's own report reaches the user."""
    with pytest.raises(
        UnsupportedModelError,
        match=r"torch.export cannot trace Choosing: Could not guard on data-dependent.*, "
        r"at test_refused_families.py:\d+ in the model ",
    ):
        capture(Choosing().eval())
    assert capfd.readouterr() == ("", "")


def test_meta_models_are_refused_alike() -> None:
    with torch.device("meta"):
        model = Recurrent(nn.GRU).eval()
    with pytest.raises(UnsupportedModelError, match=r"aten\.gru"):
        capture(model)
