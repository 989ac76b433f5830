"""The approximations, each against autograd with naive finite differences in float64; and what
padding and float32 may cost.
"""

import copy
import importlib.resources
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.oracle.compare import assert_equals_reference
from tests.oracle.reference import reference
from tests.support.grid import grid
from tests.support.models import FAMILIES, gpt2, opt, randomized, simulate, simulator_of, tokens
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import SIMULATOR, UPDATE_COSINE, cosine, error, measured
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

DEVIATIONS: dict[str, dict[str, Any]] = {
    "mean_embedding": {"loss_gradient": "mean_embedding"},
    "quadratic": {"loss_gradient": "quadratic"},
    "first_order_norm": {"norm_gradient": "first_order"},
    "first_order_activation": {"activation_gradient": "first_order"},
    "value_attention": {"attention_gradient": "value"},
    "bias_norm_update": {"norm_update": "bias"},
}
FROM_PAPER: dict[str, dict[str, Any]] = {
    "mean_embedding": {"loss_gradient": "mean_embedding"},
    "quadratic": {"loss_gradient": "quadratic"},
    "exact_norm": {"norm_gradient": "exact"},
    "exact_activation": {"activation_gradient": "exact"},
    "full_attention": {"attention_gradient": "full"},
    "all_norm_update": {"norm_update": "all"},
    "small_scale": {"finite_difference_scale": 3.0},
    "ascent": {"inner_lr": -0.01},
}


@grid(family=FAMILIES, budget=[(1, None), (2, 1)], scenario=SCENARIOS)
def test_paper(family: str, budget: tuple[int, int | None], scenario: str) -> None:
    """ffn is not D, so the paper code's first defect (TINT.md section 4) would show."""
    steps, layers = budget
    config = SimulatorConfig.paper(inner_lr=0.01, steps=steps, layers=layers)
    assert_equals_reference(FAMILIES[family](ffn=31), config, **SCENARIOS[scenario](4, 11, 29))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu", "tanh"])
def test_paper_with_every_activation(activation: str) -> None:
    config = SimulatorConfig.paper(inner_lr=0.01, steps=2, finite_difference_scale=10.0)
    assert_equals_reference(opt(activation=activation), config, **SCENARIOS["ragged"](2, 11, 29))


@pytest.mark.parametrize("name", DEVIATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_deviation_from_exact(family: str, name: str) -> None:
    # A small scale makes the difference differ from the derivative by far more than the tolerance.
    config = SimulatorConfig.exact(
        **{"inner_lr": 0.003, "steps": 2, "finite_difference_scale": 5.0, **DEVIATIONS[name]}
    )
    model, inputs = FAMILIES[family](layers=2), SCENARIOS["ragged"](3, 11, 29)
    assert_equals_reference(model, config, **inputs)
    exact = simulator_of(model, SimulatorConfig.exact(inner_lr=0.003, steps=2))(**inputs).logits
    relu_is_piecewise_linear = family == "opt" and name == "first_order_activation"
    difference = error(simulator_of(model, config)(**inputs).logits, exact)
    assert difference > (1e-8 if relu_is_piecewise_linear else 1e-5), (
        "the deviation changes nothing"
    )


@pytest.mark.parametrize("name", FROM_PAPER)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_deviation_from_paper(family: str, name: str) -> None:
    config = SimulatorConfig.paper(
        **{"inner_lr": 0.003, "steps": 2, "layers": 1, **FROM_PAPER[name]}
    )
    assert_equals_reference(FAMILIES[family](), config, **SCENARIOS["padded_left"](3, 11, 29))


@pytest.mark.parametrize("side", ["padded_left", "padded_right", "padded_both"])
@pytest.mark.parametrize("preset", ["paper", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_alone(family: str, preset: str, side: str) -> None:
    config = SimulatorConfig.preset(preset, inner_lr=0.01, steps=2)
    simulator = simulator_of(FAMILIES[family](), config)
    inputs = SCENARIOS[side](5, 13, 29)
    with torch.inference_mode():
        together = simulator(**inputs, return_initial=True)
        weights = [simulator.updated_state_dict(**inputs, index=b) for b in range(5)]
        for b in range(5):
            keep = inputs["attention_mask"][b].bool()
            alone_inputs = {
                name: inputs[name][b, keep][None] for name in ("input_ids", "train_mask")
            }
            alone = simulator(**alone_inputs, return_initial=True)
            for padded, single in (
                (together.logits, alone.logits),
                (together.initial_logits, alone.initial_logits),
            ):
                difference = error(padded[b, keep], single[0])
                assert (
                    measured(
                        "a padded sequence against the same alone: logits, float64", difference
                    )
                    < SIMULATOR[torch.float64]
                )
            state = simulator.updated_state_dict(**alone_inputs)
            assert all(
                error(weights[b][name], state[name]) < SIMULATOR[torch.float64] for name in state
            )


def test_what_padding_holds_does_not_matter() -> None:
    simulator = simulator_of(opt(), SimulatorConfig.paper(inner_lr=0.01, steps=2))
    inputs = SCENARIOS["padded_both"](4, 13, 29)
    real = inputs["attention_mask"].bool()
    other = {
        **inputs,
        "input_ids": torch.where(real, inputs["input_ids"], tokens(4, 13, 29, seed=8)),
    }
    assert torch.equal(simulator(**inputs).logits[real], simulator(**other).logits[real])


def update_cosines(
    model: Any, config: SimulatorConfig, ids: Tensor, train_mask: Tensor
) -> dict[str, float]:
    """Cosine of the float32 and the float64 update of each slot that has one."""
    wide: Simulator = simulate(copy.deepcopy(model).double(), config)
    narrow: Simulator = simulate(model.float(), config)
    with torch.inference_mode():
        expected, found = wide.updates(ids, train_mask), narrow.updates(ids, train_mask)
    assert set(expected) == set(found)
    cosines = {}
    for slot, value in expected.items():
        where = wide.program.layout.prefix[slot]
        before = wide.prefix.tensors()[where.parameter]
        before = (before.t() if where.transpose else before)[where.rows.start : where.rows.stop]
        moved = narrow.prefix.tensors()[where.parameter]
        moved = (moved.t() if where.transpose else moved)[where.rows.start : where.rows.stop]
        cosines[slot] = cosine(found[slot] - moved, value - before)
    measured(
        "paper: 1 - cosine of a float32 update with its float64 update", 1 - min(cosines.values())
    )
    return cosines


# With 1, storing the update in float32 weights costs no digits, and the gradient itself is
# compared; 1e-4 is the default.
inner_lrs = pytest.mark.parametrize("inner_lr", [1.0, 1e-4])


@inner_lrs
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_float32_update_of_a_small_model(family: str, inner_lr: float) -> None:
    model = FAMILIES[family](hidden=24, ffn=50, dtype=torch.float32)
    cosines = update_cosines(
        model, SimulatorConfig.paper(inner_lr=inner_lr), tokens(1, 14, 29), torch.ones(1, 14)
    )
    assert len(cosines) > 10
    assert min(cosines.values()) >= UPDATE_COSINE, cosines


@inner_lrs
def test_float32_update_of_tiny_opt(inner_lr: float) -> None:
    with importlib.resources.as_file(
        importlib.resources.files("tintc") / "data" / "tiny-opt"
    ) as directory:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
    ids = tokens(1, 64, model.config.vocab_size)
    cosines = update_cosines(
        model, SimulatorConfig.paper(inner_lr=inner_lr), ids, torch.ones(1, 64)
    )
    assert len(cosines) > 10
    assert min(cosines.values()) >= UPDATE_COSINE, sorted(
        cosines.items(), key=lambda item: item[1]
    )[:5]


@pytest.mark.slow
@inner_lrs
def test_float32_update_of_the_opt_125m_shape(inner_lr: float) -> None:
    config = transformers.OPTConfig(
        vocab_size=50272,
        hidden_size=768,
        num_hidden_layers=12,
        ffn_dim=3072,
        num_attention_heads=12,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    cosines = update_cosines(
        model, SimulatorConfig.paper(inner_lr=inner_lr), tokens(1, 128, 50272), torch.ones(1, 128)
    )
    assert len(cosines) > 100
    assert min(cosines.values()) >= UPDATE_COSINE, sorted(
        cosines.items(), key=lambda item: item[1]
    )[:5]


def test_reference_differs_where_it_must() -> None:
    """The reference's own approximations are not its exact path under another name."""
    model, inputs = randomized(gpt2(), 3), SCENARIOS["ragged"](2, 9, 29)
    exact = reference(model, SimulatorConfig.exact(inner_lr=0.01), **inputs).logits
    for deviation in DEVIATIONS.values():
        config = SimulatorConfig.exact(
            **{"inner_lr": 0.01, "finite_difference_scale": 5.0, **deviation}
        )
        assert error(reference(model, config, **inputs).logits, exact) > 1e-5
