"""Whole models on the transformer back end: what the fused back end computes, out of pages, a
stream and modules alone.
"""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.both import LIMIT, assert_equal_results, both, odd_model, relative, small_nano
from tests.support.grid import grid
from tests.support.models import on_all_backends
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import BACKENDS, HALF, HALF_LOGITS, error, measured
from tintc.ir.config import PRESETS, SimulatorConfig
from tintc.ir.ops.linear import prefix
from tintc.runtime.backends.transformer.pages import PrefixPages, read_slot


@grid(family=["opt", "gpt2"], preset=PRESETS, scenario=SCENARIOS)
def test_every_scenario(family: str, preset: str, scenario: str) -> None:
    found = both(family, preset)
    assert_equal_results(found["none"], found["fused"], SCENARIOS[scenario](3, 11, 29))


CASES: dict[str, dict[str, Any]] = {
    "mean_embedding": {"loss_gradient": "mean_embedding"},
    "quadratic": {"loss_gradient": "quadratic", "inner_lr": 0.001},
    "all norms": {"norm_update": "all"},
    "one step": {"steps": 1},
    "three steps": {"steps": 3},
    "top block": {"layers": 1},
    "top two of three": {"layers": 2, "norm_update": "all"},
    "small scale": {"finite_difference_scale": 3.0},
    "full attention": {"attention_gradient": "full"},
    "exact norms": {"norm_gradient": "exact"},
    "ascent": {"inner_lr": -0.01},
}


@grid(together=1, family=["opt", "gpt2"], case=CASES)
def test_every_choice(family: str, case: str) -> None:
    found = both(family, **CASES[case])
    for batch in (1, 3):
        assert_equal_results(found["none"], found["fused"], SCENARIOS["ragged"](batch, 9, 29))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (2, 3), (1, 16), (5, 7)])
def test_lengths(preset: str, batch: int, length: int) -> None:
    found = both("nano", preset)
    assert_equal_results(found["none"], found["fused"], SCENARIOS["ragged"](batch, length, 29))


MODELS: dict[str, dict[str, Any]] = {
    "post norm and projections": {"do_layer_norm_before": False, "word_embed_proj_dim": 7},
    "no biases": {"enable_bias": False},
    "plain norms": {"layer_norm_elementwise_affine": False},
    "untied head": {"tie_word_embeddings": False},
    "one head": {"heads": 1, "hidden": 7, "ffn": 3, "activation": "gelu"},
}


@grid(together=1, name=MODELS, preset=PRESETS)
@pytest.mark.slow
def test_other_models(name: str, preset: str) -> None:
    found = on_all_backends(
        odd_model("opt", **MODELS[name]), SimulatorConfig.preset(preset, inner_lr=0.01, steps=2)
    )
    assert_equal_results(found["none"], found["fused"], SCENARIOS["padded_left"](2, 9, 29))


GEOMETRIES: list[dict[str, int]] = [
    {"prefix_tokens": 1},
    {"prefix_tokens": 3},  # fewer than the coordinates of a head
    {"prefix_tokens": 17},  # more than any matrix has rows
    {"sim_hidden": 7},  # a prime: heads of one coordinate
    {"sim_hidden": 60},
    {"sim_heads": 2},
    {"sim_heads": 7},
    {"prefix_tokens": 3, "sim_hidden": 16, "sim_heads": 4},
    {"prefix_tokens": 2, "sim_hidden": 21, "sim_heads": 3},
    {"prefix_tokens": 1, "sim_hidden": 6, "sim_heads": 6},
]


@pytest.mark.parametrize(
    "sizes",
    GEOMETRIES,
    ids=lambda sizes: " ".join(f"{name} {size}" for name, size in sizes.items()),
)
def test_given_sizes(sizes: dict[str, int]) -> None:
    """Whatever K, D_sim and H_sim: other tiles, the same numbers."""
    config = SimulatorConfig.paper(
        inner_lr=0.01, steps=2, norm_update="all", attention_gradient="full", **sizes
    )
    found = small_nano(config, layers=1)
    layout = found["none"].program.layout
    assert {name: getattr(layout, name) for name in sizes} == sizes
    assert_equal_results(found["none"], found["fused"], SCENARIOS["ragged"](2, 9, 19))


@pytest.mark.slow
@given(
    st.integers(2, 6),
    st.integers(0, 6),
    st.sampled_from([1, 7, 12]),
    st.sampled_from(PRESETS),
    st.data(),
)
@settings(max_examples=8)
def test_any_sizes(heads: int, more: int, ffn: int, preset: str, data: st.DataObject) -> None:
    width = math.ceil(6 / heads) + more
    sizes = {
        "prefix_tokens": data.draw(st.integers(1, width)),
        "sim_hidden": heads * width,
        "sim_heads": heads,
    }
    config = SimulatorConfig.preset(preset, inner_lr=0.01, **sizes)
    found = small_nano(config, ffn=ffn, layers=1)
    assert_equal_results(found["none"], found["fused"], SCENARIOS["ragged"](2, 7, 19))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_outer_gradients(family: str, preset: str) -> None:
    """A loss on the logits after two steps reaches the inner learning rate, the pages and the
    tables as it does the fused weights.
    """
    found, inputs = both(family, preset), SCENARIOS["scattered"](2, 8, 29)
    gradients = {}
    for name in ("fused", "none"):
        simulator = copy.deepcopy(found[name])
        logits = simulator(**inputs).logits
        F.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
        ).backward()
        gradients[name] = simulator
    fused, transformer = gradients["fused"], gradients["none"]
    assert abs(float(fused.inner_lr.grad)) > 1e-3
    assert (
        measured(
            "transformer against fused: gradient of inner_lr",
            relative(transformer.inner_lr.grad, fused.inner_lr.grad),
        )
        < LIMIT
    )
    assert isinstance(transformer.prefix, PrefixPages)
    expected = {name: p.grad for name, p in fused.prefix.tensors().items()}
    pages = {
        i: torch.zeros_like(page) if page.grad is None else page.grad
        for i, page in enumerate(transformer.prefix.pages)
    }
    for slot in transformer.program.layout.prefix.values():
        whole = expected[slot.parameter]
        rows = prefix(whole, slot.rows.start, slot.rows.stop, slot.rows.period, slot.transpose)
        assert (
            measured(
                "transformer against fused: gradient of weights",
                error(read_slot(pages, slot), rows),
            )
            < LIMIT
        ), slot.name
    for name, table in transformer.prefix.direct().items():
        assert error(table.grad, expected[name]) < LIMIT, name
    assert all(p.grad is None for p in transformer.structure.parameters())


@pytest.mark.slow
def test_recording_changes_nothing() -> None:
    """In place or by copies, the numbers agree; and a second call gives the same bits as the
    first.
    """
    simulator, inputs = both("opt", "exact")["none"], SCENARIOS["ragged"](2, 9, 29)
    before = {name: value.clone() for name, value in simulator.state_dict().items()}
    recorded = simulator(**inputs).logits
    with torch.inference_mode():
        first, second = simulator(**inputs).logits, simulator(**inputs).logits
    assert recorded.requires_grad
    assert torch.equal(first, second)
    assert error(recorded, first) < 1e-12
    assert all(torch.equal(before[name], value) for name, value in simulator.state_dict().items())


def test_initial_logits_are_not_overwritten_by_later_steps() -> None:
    """Outputs are copies: their coordinates are free for other activations afterwards."""
    simulator, inputs = both("opt")["none"], SCENARIOS["ragged"](2, 9, 29)
    with torch.inference_mode():
        out = simulator(**inputs, return_initial=True)
        assert error(out.initial_logits, simulator.predict_initial(inputs["input_ids"])) < LIMIT
    assert (
        out.logits.is_contiguous() and out.logits.untyped_storage().size() == out.logits.numel() * 8
    )


@grid(family=["opt", "gpt2"], dtype=[torch.float32, *HALF], preset=PRESETS)
@pytest.mark.slow
def test_lower_precision(family: str, dtype: torch.dtype, preset: str) -> None:
    """Compiled in that dtype, and converted to it."""
    inputs = SCENARIOS["padded_left"](3, 11, 29)
    exact = both(family, preset)["fused"]
    config = SimulatorConfig.preset(preset, inner_lr=0.01, steps=2)
    compiled = on_all_backends(odd_model(family, dtype=dtype), config)["none"]
    converted = copy.deepcopy(both(family, preset)["none"]).to(dtype)
    limit = BACKENDS[dtype] if dtype in BACKENDS else HALF_LOGITS[dtype]
    with torch.inference_mode():
        expected = exact(**inputs, return_initial=True)
        for simulator in (compiled, converted):
            assert simulator.dtype == dtype
            assert {p.dtype for p in simulator.structure.parameters()} == {dtype}
            assert simulator.inner_lr.dtype == torch.float64
            out = simulator(**inputs, return_initial=True)
            assert out.logits.dtype == dtype
            assert (
                measured(f"transformer, {dtype}: logits", error(out.logits, expected.logits))
                < limit
            )
            assert error(out.initial_logits, expected.initial_logits) < limit
            assert all(value.dtype == dtype for value in simulator.updates(**inputs).values())


def test_deepcopy_is_independent() -> None:
    inputs, simulator = SCENARIOS["ragged"](2, 9, 29), both("opt")["none"]
    with torch.inference_mode():
        expected = simulator(**inputs).logits
    twin = copy.deepcopy(simulator)
    with torch.inference_mode():
        assert torch.equal(twin(**inputs).logits, expected)
    with torch.no_grad():
        for parameter in twin.prefix.parameters():
            parameter.mul_(0.5)
    with torch.inference_mode():
        assert torch.equal(simulator(**inputs).logits, expected)
        assert error(twin(**inputs).logits, expected) > 1e-3


def test_state_dict_round_trip() -> None:
    inputs, config = SCENARIOS["ragged"](2, 9, 29), SimulatorConfig.paper(inner_lr=0.01)
    trained, fresh = (
        on_all_backends(odd_model("gpt2", seed=seed), config)["none"] for seed in (0, 1)
    )
    with torch.inference_mode():
        expected = trained(**inputs).logits
        assert error(fresh(**inputs).logits, expected) > 1e-2
        fresh.load_state_dict(trained.state_dict(), strict=True)
        assert torch.equal(fresh(**inputs).logits, expected)


def test_a_sequence_without_a_target_keeps_its_weights() -> None:
    simulator, inputs = both("opt", "exact")["none"], SCENARIOS["ragged"](3, 11, 29)
    train = inputs["train_mask"].clone()
    train[1] = 0
    with torch.inference_mode(), pytest.warns(UserWarning, match="1 of 3"):
        out = copy.deepcopy(simulator)(inputs["input_ids"], train, return_initial=True)
    assert error(out.logits[1], out.initial_logits[1]) < LIMIT
    with torch.inference_mode():
        assert (
            error(out.logits[[0, 2]], simulator(inputs["input_ids"][[0, 2]], train[[0, 2]]).logits)
            < LIMIT
        )
