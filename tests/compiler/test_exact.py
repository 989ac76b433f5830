"""The preset `exact` is ordinary dynamic evaluation: it equals torch.autograd and SGD."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle.compare import assert_equals_reference
from tests.support.grid import grid
from tests.support.models import FAMILIES, gpt2, opt, ragged_train_mask, simulator_of, tokens
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import SIMULATOR, error
from tintc.ir.config import SimulatorConfig

FLOAT64, FLOAT32 = torch.float64, torch.float32


@grid(family=FAMILIES, steps=[1, 3], layers=[1, None], scenario=SCENARIOS)
def test_float64(family: str, steps: int, layers: int | None, scenario: str) -> None:
    config = SimulatorConfig.exact(inner_lr=0.01, steps=steps, layers=layers)
    assert_equals_reference(FAMILIES[family](), config, **SCENARIOS[scenario](5, 11, 29))


@grid(together=1, family=FAMILIES, steps=[1, 3], layers=[1, None], scenario=SCENARIOS)
def test_float32(family: str, steps: int, layers: int | None, scenario: str) -> None:
    config = SimulatorConfig.exact(inner_lr=0.005, steps=steps, layers=layers)
    assert_equals_reference(
        FAMILIES[family](dtype=FLOAT32), config, **SCENARIOS[scenario](5, 11, 29)
    )


@pytest.mark.parametrize("length", [2, 16], ids=["shortest", "longest"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_and_length(family: str, batch: int, length: int) -> None:
    model = FAMILIES[family](positions=16)
    config = SimulatorConfig.exact(inner_lr=0.01, steps=2)
    assert_equals_reference(
        model,
        config,
        input_ids=tokens(batch, length, 29),
        train_mask=ragged_train_mask(batch, length),
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "post_norm": {"do_layer_norm_before": False},
    "projections": {"word_embed_proj_dim": 7},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "no_biases": {"enable_bias": False},
    "plain_norms": {"layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": "silu"},
    "tanh": {"activation": "tanh"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_opt_variants(name: str) -> None:
    inputs = SCENARIOS["padded_left"](3, 11, 29)
    assert_equals_reference(
        opt(**VARIANTS[name]), SimulatorConfig.exact(inner_lr=0.005, steps=2), **inputs
    )
    assert_equals_reference(
        opt(**VARIANTS[name]), SimulatorConfig.exact(inner_lr=0.005, steps=2, layers=1), **inputs
    )


GPT2_VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "gelu": {"activation": "gelu"},
    "gelu_pytorch_tanh": {"activation": "gelu_pytorch_tanh"},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
}


@pytest.mark.parametrize("name", GPT2_VARIANTS)
def test_gpt2_variants(name: str) -> None:
    inputs = SCENARIOS["demonstrations"](3, 11, 29)
    assert_equals_reference(
        gpt2(**GPT2_VARIANTS[name]), SimulatorConfig.exact(inner_lr=0.005, steps=2), **inputs
    )
    assert_equals_reference(
        gpt2(**GPT2_VARIANTS[name]),
        SimulatorConfig.exact(inner_lr=0.005, steps=2, layers=1),
        **inputs,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=7)
@given(
    heads=st.integers(1, 4),
    width=st.integers(2, 7),
    ffn=st.integers(1, 40),
    vocab=st.integers(2, 50),
    layers=st.integers(1, 3),
    length=st.integers(2, 13),
    batch=st.integers(1, 3),
    steps=st.integers(1, 3),
    scenario=st.sampled_from(sorted(SCENARIOS)),
)
def test_any_dimensions(
    family: str,
    heads: int,
    width: int,
    ffn: int,
    vocab: int,
    layers: int,
    length: int,
    **drawn: Any,
) -> None:
    model = FAMILIES[family](
        vocab=vocab,
        hidden=heads * width,
        heads=heads,
        ffn=ffn,
        layers=layers,
        positions=13,
        seed=vocab,
    )
    config = SimulatorConfig.exact(inner_lr=0.003, steps=drawn["steps"])
    length = max(length, 5)  # so that a position scenario's numbers fit and padded sequences differ
    inputs = SCENARIOS[drawn["scenario"]](drawn["batch"], length, vocab, seed=ffn)
    assert_equals_reference(model, config, min_update=0.0, **inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_dimensional_padding_equals_two_dimensional(family: str) -> None:
    inputs = SCENARIOS["padded_left"](4, 11, 29)
    simulator = simulator_of(FAMILIES[family](), SimulatorConfig.exact(inner_lr=0.01, steps=2))
    real = inputs["attention_mask"].bool()
    cube = real[:, None, :] & real[:, :, None]
    with torch.inference_mode():
        flat = simulator(**inputs).logits
        deep = simulator(**{**inputs, "attention_mask": cube}).logits
    assert error(deep[real], flat[real]) < SIMULATOR[FLOAT64]


@pytest.mark.parametrize("family", FAMILIES)
def test_updated_state_dict_loads_back(family: str) -> None:
    """The model with the updated state dict gives the simulator's logits, on the sequence and on
    any other.
    """
    model = FAMILIES[family]()
    simulator = simulator_of(model, SimulatorConfig.exact(inner_lr=0.01, steps=2))
    ids, train_mask = tokens(3, 11, 29), ragged_train_mask(3, 11)
    other = tokens(3, 8, 29, seed=9)
    logits = simulator(ids, train_mask).logits
    elsewhere = simulator.predict(simulator.updates(ids, train_mask), other)
    for index in (0, 2, -1):
        state = simulator.updated_state_dict(ids, train_mask, index=index)
        fresh = FAMILIES[family](seed=1)
        fresh.load_state_dict(state, strict=True)
        with torch.inference_mode():
            assert error(fresh(ids[index][None]).logits[0], logits[index]) < SIMULATOR[FLOAT64]
            assert error(fresh(other[index][None]).logits[0], elsewhere[index]) < SIMULATOR[FLOAT64]


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_weights_do_not_change(family: str) -> None:
    """Embeddings, the head, and blocks below the trained ones keep every bit."""
    model = FAMILIES[family](layers=3)
    simulator = simulator_of(model, SimulatorConfig.exact(inner_lr=0.01, layers=2))
    state = simulator.updated_state_dict(tokens(1, 9, 29), torch.ones(1, 9))
    before = model.state_dict()
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    blocks = {"opt": "model.decoder.layers.{}.", "gpt2": "transformer.h.{}."}[family]
    norm = {"opt": "model.decoder.final_layer_norm.", "gpt2": "transformer.ln_f."}[family]
    may = (blocks.format(1), blocks.format(2), norm)
    # A bias of the keys adds the same to every score of a query, so it has no gradient; rounding
    # may leave a trace of one.
    always = {name for name in state if name.startswith(may) and not name.endswith("k_proj.bias")}
    assert always <= changed
    assert all(name.startswith(may) for name in changed)
