import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
    "steps fraction": ({"steps": 1.5}, "steps is 1.5"),
    "steps bool": ({"steps": True}, "steps is True"),
    "steps None": ({"steps": None}, "steps is None"),
    "layers": ({"layers": 0}, "layers is 0; expected a whole number of at least 1"),
    "layers negative": ({"layers": -1}, "layers is -1"),
    "inner_lr nan": ({"inner_lr": float("nan")}, "inner_lr is nan; expected a finite number"),
    "inner_lr inf": ({"inner_lr": float("inf")}, "inner_lr is inf"),
    "inner_lr text": ({"inner_lr": "1e-4"}, "inner_lr is '1e-4'"),
    "inner_lr bool": ({"inner_lr": True}, "inner_lr is True"),
    "scale": (
        {"finite_difference_scale": 0},
        "finite_difference_scale is 0.0; expected a number above 0",
    ),
    "scale negative": ({"finite_difference_scale": -5.0}, "finite_difference_scale is -5.0"),
    "loss": (
        {"loss_gradient": "hinge"},
        "loss_gradient is 'hinge'; expected one of softmax, mean_embedding, quadratic",
    ),
    "norm": ({"norm_gradient": "first-order"}, "expected one of first_order, exact"),
    "update": ({"norm_update": None}, "norm_update is None; expected one of bias, all"),
    "activation": ({"activation_gradient": "none"}, "expected one of first_order, exact"),
    "attention": ({"attention_gradient": "keys"}, "expected one of value, full"),
    "K": ({"prefix_tokens": 0}, "prefix_tokens is 0"),
    "D_sim": ({"sim_hidden": -3}, "sim_hidden is -3"),
    "H_sim": ({"sim_heads": 2.0}, "sim_heads is 2.0"),
    "unknown": ({"lr": 1.0}, "unknown config field lr; the fields are steps, layers, inner_lr"),
}


@pytest.mark.parametrize(
    "make", [SimulatorConfig.paper, SimulatorConfig.exact, lambda **f: SimulatorConfig.from_dict(f)]
)
@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, make: Any) -> None:
    fields, message = BAD[name]
    with pytest.raises(UsageError) as caught:
        make(**fields)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_presets_are_those_of_tint() -> None:
    paper, exact = SimulatorConfig.paper(), SimulatorConfig.exact()
    assert paper == SimulatorConfig()
    assert (paper.loss_gradient, paper.norm_gradient, paper.norm_update) == (
        "softmax",
        "first_order",
        "bias",
    )
    assert (paper.activation_gradient, paper.attention_gradient, paper.finite_difference_scale) == (
        "first_order",
        "value",
        1000.0,
    )
    assert (exact.loss_gradient, exact.norm_gradient, exact.norm_update) == (
        "softmax",
        "exact",
        "all",
    )
    assert (exact.activation_gradient, exact.attention_gradient) == ("exact", "full")
    assert exact.is_exact
    assert not paper.is_exact


@pytest.mark.parametrize(
    "field",
    ["loss_gradient", "norm_gradient", "norm_update", "activation_gradient", "attention_gradient"],
)
def test_one_approximation_is_enough_to_be_inexact(field: str) -> None:
    value = {"loss_gradient": "quadratic"}.get(field, getattr(SimulatorConfig.paper(), field))
    assert not SimulatorConfig.exact(**{field: value}).is_exact


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="preset is 'fast'; expected one of paper, exact"):
        SimulatorConfig.preset("fast")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SimulatorConfig().steps = 2  # type: ignore[misc]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(1, 100),
            "layers": st.none() | st.integers(1, 100),
            "inner_lr": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-3, 3),
            "loss_gradient": st.sampled_from(["softmax", "mean_embedding", "quadratic"]),
            "norm_gradient": st.sampled_from(["first_order", "exact"]),
            "finite_difference_scale": st.floats(1e-3, 1e6),
            "prefix_tokens": st.none() | st.integers(1, 4096),
        },
    )
)
def test_overrides_and_json_round_trip(fields: dict[str, Any]) -> None:
    for make in (SimulatorConfig.paper, SimulatorConfig.exact):
        config = make(**fields)
        assert {name: getattr(config, name) for name in fields} == fields
        untouched = {name: value for name, value in make().to_dict().items() if name not in fields}
        assert untouched.items() <= config.to_dict().items()
        assert SimulatorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
