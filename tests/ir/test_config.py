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
    "momentum": ({"momentum": 1}, "momentum is 1; expected a number from 0 to below 1"),
    "momentum text": ({"momentum": "much"}, "momentum is 'much'; expected a number"),
    "momentum bool": ({"momentum": True}, "momentum is True"),
    "nesterov": ({"nesterov": 1}, "nesterov is 1; expected true or false"),
    "decay": ({"decay": 1.5}, "decay is 1.5; expected a number from 0 to 1"),
    "decay nan": ({"decay": float("nan")}, "decay is nan"),
    "clip": ({"clip_norm": 0}, "clip_norm is 0; expected a number above 0"),
    "clip text": ({"clip_norm": "a lot"}, "clip_norm is 'a lot'; expected a number above 0"),
    "drift": ({"max_drift": -1.0}, "max_drift is -1.0; expected a number above 0"),
    "drift inf": ({"max_drift": float("inf")}, "max_drift is inf"),
    "normalize": ({"normalize": "row"}, "normalize is 'row'; expected one of none, weight"),
    "optimizer": ({"optimizer": "lion"}, "expected one of sgd, adam, rms, muon"),
    "eps": ({"eps": 0}, "eps is 0; expected a number above 0"),
    "betas": ({"betas": (0.9, 1.0)}, "one of betas is 1.0; expected a number from 0 to below 1"),
    "betas alone": ({"betas": 0.9}, "betas is 0.9; expected two numbers from 0 to below 1"),
    "betas three": ({"betas": "0.9,0.99,0.999"}, "betas is '0.9,0.99,0.999'; expected two"),
    "betas text": ({"betas": ["a", "b"]}, "one of betas is 'a'"),
    "schedule": (
        {"schedule": "exponential"},
        "schedule is ['exponential']; expected constant, linear, cosine, or a factor for each step",
    ),
    "schedule long": (
        {"schedule": (1, 0.5)},
        "schedule has 2 factors; expected one for each of the 1 steps",
    ),
    "schedule short": ({"schedule": "1,0.5", "steps": 3}, "schedule has 2 factors; expected one"),
    "schedule none": ({"schedule": ()}, "schedule has 0 factors"),
    "schedule nan": ({"schedule": (float("nan"),)}, "a factor of schedule is nan; expected a fin"),
    "schedule number": ({"schedule": 0.5}, "schedule is 0.5; expected constant, linear, cosine"),
    "factor text": ({"lr_scale": {"*": "x"}}, "lr_scale of * is 'x'; expected a finite number"),
    "factor inf": ({"lr_scale": {"*.a": float("inf")}}, "lr_scale of *.a is inf"),
    "factor none": ({"lr_scale": "*.bias"}, "lr_scale is '*.bias'; expected PATTERN=FACTOR"),
    "factor alone": ({"lr_scale": "=2"}, "lr_scale is '=2'; expected PATTERN=FACTOR"),
    "factor number": ({"lr_scale": 2}, "lr_scale is 2; expected a factor for each pattern"),
    "train number": ({"train": 3}, "train is 3; expected patterns of parameter names"),
    "train empty": ({"train": ("*.a", "")}, "train is ('*.a', ''); expected patterns"),
    "train dict": ({"train": {"a": 1}}, "train is {'a': 1}; expected patterns"),
    # what contradicts: TINT.md section 7
    "nesterov alone": (
        {"nesterov": True},
        "the config has nesterov without momentum; expected momentum above 0",
    ),
    "clip and normalize": (
        {"clip_norm": 1.0, "normalize": "weight"},
        "the config has clip_norm and normalize; expected one of them",
    ),
    "clip and muon": (
        {"clip_norm": 1.0, "optimizer": "muon"},
        "the config has clip_norm and optimizer muon; expected one of them",
    ),
    "momentum and adam": (
        {"momentum": 0.9, "optimizer": "adam"},
        "the config has momentum and optimizer adam; expected sgd or muon, or no momentum",
    ),
    "momentum and rms": (
        {"momentum": 0.9, "optimizer": "rms"},
        "the config has momentum and optimizer rms",
    ),
    "train and layers": (
        {"train": "*.mlp.*", "layers": 1},
        "the config has train and layers; expected one of them",
    ),
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


@pytest.mark.parametrize("make", [SimulatorConfig.paper, SimulatorConfig.exact])
def test_train_and_norm_update_are_both_given(make: Any) -> None:
    with pytest.raises(UsageError, match="train and norm_update are both given; expected one"):
        make(train="*.mlp.*", norm_update="all")
    assert make(train="*.mlp.*").train == ("*.mlp.*",)


def test_spellings_of_a_rule() -> None:
    """As Python, JSON and the command line have them."""
    expected = SimulatorConfig(
        steps=2,
        train=("*.a", "b"),
        lr_scale=(("*.a", 0.5), ("b", 2.0)),
        schedule=(1.0, 0.5),
        betas=(0.8, 0.9),
    )
    pairs = ([["*.a", 0.5], ("b", 2)], {"*.a": 0.5, "b": 2}, ["*.a=0.5", "b=2"])
    for lr_scale in pairs:
        for schedule in ((1, 0.5), [1.0, 0.5], "1,0.5", " 1, .5"):
            for betas in ((0.8, 0.9), [0.8, 0.9], "0.8,0.9"):
                assert expected == SimulatorConfig(
                    steps=2, train=["*.a", "b"], lr_scale=lr_scale, schedule=schedule, betas=betas
                )
    assert SimulatorConfig(lr_scale="a=b=2").lr_scale == (("a=b", 2.0),)
    assert hash(expected) == hash(SimulatorConfig.from_dict(expected.to_dict()))


def test_the_last_factor_of_a_pattern_stays_the_last() -> None:
    """Order decides which pattern wins, so a pattern that is given twice moves to the end."""
    config = SimulatorConfig(lr_scale=("a=1", "b=2", "a=3"))
    assert config.lr_scale == (("b", 2.0), ("a", 3.0))
    assert SimulatorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_schedules() -> None:
    def factors(schedule: Any) -> list[float]:
        config = SimulatorConfig(steps=4, schedule=schedule)
        return [round(config.schedule_factor(k), 12) for k in range(4)]

    assert factors("constant") == [1, 1, 1, 1]
    assert factors("linear") == [1, 0.75, 0.5, 0.25]
    assert factors("cosine") == [1, 0.853553390593, 0.5, 0.146446609407]
    assert factors("3,2,1,-1") == [3, 2, 1, -1]


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
            "train": st.lists(st.text(min_size=1), max_size=3).map(tuple),
            "lr_scale": st.dictionaries(st.text(min_size=1), st.floats(-9, 9), max_size=3).map(
                lambda factors: tuple(factors.items())
            ),
            "schedule": st.sampled_from(["constant", "linear", "cosine"]),
            "decay": st.floats(0, 1),
            "max_drift": st.none() | st.floats(1e-3, 1e3),
            "betas": st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
            "eps": st.floats(1e-9, 1),
        },
    )
)
def test_overrides_and_json_round_trip(fields: dict[str, Any]) -> None:
    if fields.get("train"):
        fields.pop("layers", None)
    for make in (SimulatorConfig.paper, SimulatorConfig.exact):
        config = make(**fields)
        assert {name: getattr(config, name) for name in fields} == fields
        untouched = {name: value for name, value in make().to_dict().items() if name not in fields}
        assert untouched.items() <= config.to_dict().items()
        assert SimulatorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
