import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.support.models import randomized
from tests.support.spelled import angles, causal, merged, rotated
from tests.support.stages import (
    apply,
    assert_golden,
    assert_same_numbers,
    before,
    inputs,
    numbers,
    printed,
    stage,
)
from tests.support.tolerances import CASTS, error
from tests.support.toys import toy
from tintc.ir.errors import UnsupportedModelError


def refusal(model: torch.nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        stage("refuse_unsupported", model=model)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_accepts_without_a_change() -> None:
    at = before("refuse_unsupported")
    text = printed(at.graph)
    assert printed(apply("refuse_unsupported", at).graph) == text
    assert_same_numbers("refuse_unsupported")


def test_names_every_operator_at_once() -> None:
    """Operator, count, module path, source line and reason of each."""
    message = refusal(
        toy(
            lambda m, x, ids: (
                torch.sin(torch.sin(m.linear(x))) + F.linear(x + m.scale, m.linear.weight * 2)
            )
        )
    )
    for part in (
        "aten.sin.default x2",
        "aten.linear.default x1",
        "aten.add.Tensor",
        "its weight or bias is computed",
    ):
        assert part in message
    assert "(toys.py:" in message
    assert "supported:" in message


def test_llama_is_accepted_whole() -> None:
    """Its RMS norms, gated unit, rotary positions and grouped queries, in transformers'
    spelling.
    """
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
    )
    model = randomized(transformers.LlamaForCausalLM(config)).double()
    found = stage("refuse_unsupported", model=model)
    count = found.operators()
    assert [
        count[f"tint.{name}"]
        for name in ("norm_forward", "rotary", "attention_forward", "multiply", "residual")
    ] == [5, 4, 2, 2, 4]
    given = inputs()
    assert error(numbers(found, given), model(given["input_ids"]).logits) < CASTS


def test_a_bidirectional_model_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=19,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    message = refusal(randomized(transformers.BertLMHeadModel(config)).double())
    assert (
        "aten.scaled_dot_product_attention.default x1 in bert.encoder.layer.0.attention.self"
        in message
    )
    assert "causal" in message


def test_a_mixture_of_experts_is_refused() -> None:
    config = transformers.MixtralConfig(
        vocab_size=19,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_local_experts=2,
    )
    assert (
        "Mixtral"
        in (message := refusal(randomized(transformers.MixtralForCausalLM(config)).double()))
        or "modeling_mixtral" in message
    )


class Modern(torch.nn.Module):
    """One block with an RMS norm, rotary positions, a window, a soft-capped head and a gated unit
    in one product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out, self.up, self.down = (
            torch.nn.Linear(*sizes, bias=False) for sizes in ((8, 16), (8, 8), (8, 20), (10, 8))
        )
        self.gain, self.head_gain = (
            torch.nn.Parameter(torch.ones(8)),
            torch.nn.Parameter(torch.ones(4)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.transpose(1, 2)
            for part in self.wide(x).view(*x.shape[:2], 4, 4).split([2, 1, 1], 2)
        )
        q, k = (
            rotated(F.rms_norm(part, (4,), self.head_gain, 1e-6), *angles(x)) for part in (q, k)
        )
        k, v = (part.expand(-1, 2, -1, -1) for part in (k, v))
        x = x + 0.5 * self.out(
            merged(F.scaled_dot_product_attention(q, k, v, attn_mask=causal(x).triu(-3)))
        )
        gate, up = self.up(F.rms_norm(x, (8,), 1 + self.gain, 1e-6)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def test_golden_modern(update_golden: bool) -> None:
    head = torch.nn.Linear(8, 19, bias=False)
    model = torch.nn.Sequential(
        torch.nn.Embedding(19, 8), torch.nn.Sequential(Modern()), head, Cap()
    ).double()
    assert_golden(
        "refuse_unsupported_modern",
        printed(stage("refuse_unsupported", model=model, longest=32).graph),
        update_golden,
    )


class Cap(torch.nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh(logits / 30)


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "refuse_unsupported", printed(stage("refuse_unsupported", layers=1).graph), update_golden
    )
