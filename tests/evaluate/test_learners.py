"""Learners against the Hugging Face model with torch.autograd and SGD (tests/oracle/reference.py),
and what they leave behind.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle.reference import reference
from tests.support.grid import grid
from tests.support.models import FAMILIES, tokens
from tests.support.scenarios import demonstrations, loss_mask, ragged
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.learners import losses_of
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import SourceError
from tintc.runtime.batch import Batch

SCENARIOS = {"ragged": ragged, "loss mask": loss_mask, "demonstrations": demonstrations}
LENGTH, VOCAB = 12, 29


def sequences(name: str) -> Batch:
    return Batch(**SCENARIOS[name](2, LENGTH, VOCAB))


def auxiliary(model: nn.Module) -> Auxiliary:
    return Auxiliary(model, tokenizer=object())


@lru_cache(maxsize=2)
def of_family(family: str) -> tuple[nn.Module, Auxiliary]:
    """A model and its auxiliary, captured once; nothing may change the model."""
    model = FAMILIES[family]()
    return model, auxiliary(model)


def expected(model: nn.Module, config: SimulatorConfig, given: Batch) -> Any:
    return reference(
        model,
        config,
        given.input_ids,
        given.train_mask,
        given.loss_mask,
        given.attention_mask,
        given.position_ids,
    )


@grid(
    changes=[
        {},
        {"layers": 1, "steps": 3},
        {"norm_update": "bias"},
        {"inner_lr": -0.01},
        {"steps": 3, "momentum": 0.9, "clip_norm": 0.5, "decay": 0.1, "schedule": "linear"},
        {
            "steps": 2,
            "optimizer": "adam",
            "eps": 1e-3,
            "max_drift": 0.01,
            "lr_scale": {"*.1.*": 0.0},
        },
        {"steps": 2, "normalize": "weight", "schedule": (1.0, -0.5), "inner_lr": 0.002},
    ],
    family=FAMILIES,
    scenario=SCENARIOS,
)
def test_dynamic_evaluation_is_autograd_and_sgd(
    family: str, scenario: str, changes: dict[str, Any]
) -> None:
    (model, whole), given = of_family(family), sequences(scenario)
    config = SimulatorConfig.exact(**{"inner_lr": 0.02, **changes})
    learner = whole.dynamic_evaluation(config)
    found = learner.logits(given, torch.arange(LENGTH))
    torch.testing.assert_close(found, expected(model, config, given).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("preset", ["paper", "exact"])
def test_a_simulator_is_what_it_simulates(preset: str) -> None:
    (model, whole), given = of_family("opt"), sequences("demonstrations")
    config = SimulatorConfig.preset(preset, inner_lr=0.02, layers=1, steps=2)
    found = whole.simulated(config).logits(given, torch.tensor([3, 9]))
    torch.testing.assert_close(
        found, expected(model, config, given).logits[:, [3, 9]], rtol=0, atol=1e-7
    )


def test_dynamic_evaluation_follows_the_budget_and_norms_of_an_approximate_config() -> None:
    (model, whole), given = of_family("gpt2"), sequences("ragged")
    config = SimulatorConfig.paper(inner_lr=0.02, layers=1, steps=2)
    exact = SimulatorConfig.exact(inner_lr=0.02, layers=1, steps=2, norm_update="bias")
    found = whole.dynamic_evaluation(config).logits(given, torch.arange(LENGTH))
    torch.testing.assert_close(found, expected(model, exact, given).logits, rtol=0, atol=1e-9)


def learners() -> dict[str, Any]:
    found, config = of_family("opt")[1], SimulatorConfig.exact(inner_lr=0.05)
    return {
        "unmodified": found.unmodified(),
        "simulated": found.simulated(config),
        "autograd": found.dynamic_evaluation(config),
    }


@pytest.mark.parametrize("name", ["unmodified", "simulated", "autograd"])
def test_losses_are_those_of_the_logits(name: str) -> None:
    learner, given = learners()[name], sequences("ragged")
    labels = given.input_ids.masked_fill(
        torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5, -100
    )
    losses = learner.losses(given, labels)
    log_p = learner.logits(given, torch.arange(LENGTH)).log_softmax(-1)
    for b in range(2):
        for t in range(LENGTH):
            label = -100 if t + 1 == LENGTH else int(labels[b, t + 1])
            assert float(losses[b, t]) == pytest.approx(
                0.0 if label == -100 else -float(log_p[b, t, label]), abs=1e-9
            )


@pytest.mark.parametrize("name", ["unmodified", "simulated", "autograd"])
def test_trained_on_one_sequence_predicts_another(name: str) -> None:
    model = FAMILIES["opt"]()
    given, other = (
        sequences("ragged").rows(0, 1),
        Batch(tokens(1, 7, VOCAB, seed=5), torch.zeros(1, 7).long()),
    )
    with learners()[name].trained(given) as predict:
        found = predict(other, torch.tensor([2, 6]))
    if name != "unmodified":
        model.load_state_dict(
            expected(model, SimulatorConfig.exact(inner_lr=0.05), given).states[0]
        )
    torch.testing.assert_close(
        found, model(other.input_ids).logits.detach()[:, [2, 6]], rtol=0, atol=1e-9
    )


def test_weights_and_flags_are_put_back_also_after_an_error() -> None:
    whole = of_family("opt")[1]
    learner, given = (
        whole.dynamic_evaluation(SimulatorConfig.exact(inner_lr=0.5)),
        sequences("ragged").rows(0, 1),
    )
    before = whole.unmodified().logits(given, torch.arange(LENGTH)).clone()
    flags = [parameter.requires_grad for parameter in learner.simulator.parameters()]

    def interrupted() -> None:
        with learner.trained(given) as predict:
            assert not torch.equal(predict(given, torch.arange(LENGTH)), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(whole.unmodified().logits(given, torch.arange(LENGTH)), before)
    assert [parameter.requires_grad for parameter in learner.simulator.parameters()] == flags


def test_without_a_target_nothing_is_trained() -> None:
    model = of_family("opt")[0]
    given = Batch(
        tokens(1, 6, VOCAB), torch.tensor([[1, 0, 0, 0, 0, 0]])
    )  # the first token is nobody's target
    for learner in learners().values():
        torch.testing.assert_close(
            learner.logits(given, torch.arange(6)),
            model(given.input_ids).logits.detach(),
            rtol=0,
            atol=1e-12,
        )


def test_simulators_of_one_model_share_its_weights_and_leave_the_model_alone() -> None:
    whole = of_family("opt")[1]
    one, other = (
        whole.simulator(SimulatorConfig.paper()),
        whole.simulator(SimulatorConfig.exact(layers=1)),
    )
    assert whole.simulator(SimulatorConfig.paper(inner_lr=0.5)) is one
    pairs = [
        (dict(one.prefix.named_parameters())[name], value)
        for name, value in other.prefix.named_parameters()
    ]
    assert pairs and all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_the_identity_follows_the_weights() -> None:
    first, same, other = (auxiliary(FAMILIES["opt"](seed=seed)).identity for seed in (0, 0, 1))
    assert first == same and first["digest"] != other["digest"]
    assert auxiliary(FAMILIES["opt"](dtype=torch.float32)).identity["dtype"] == "float32"


def test_a_source_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    FAMILIES["opt"]().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="has no tokenizer"):
        Auxiliary(str(tmp_path))


def test_losses_of_asks_for_the_positions_with_labels_alone() -> None:
    asked: list[Tensor] = []

    def logits(keep_K: Tensor) -> Tensor:
        asked.append(keep_K)
        return torch.zeros(2, len(keep_K), 5)

    labels = torch.full((2, 6), -100)
    labels[0, 2], labels[1, 5] = 3, 1
    losses = losses_of(logits, labels)
    assert asked[0].tolist() == [1, 4]
    assert (
        losses[0, 1] == losses[1, 4] == pytest.approx(torch.tensor(5.0).log().item())
        and int((losses != 0).sum()) == 2
    )
