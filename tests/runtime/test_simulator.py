"""The module that a user holds: modes, outer gradients, dtypes, devices, and the answers that do
not depend on the path taken.
"""

import copy
import operator
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.grid import grid
from tests.support.models import (
    FAMILIES,
    opt,
    ragged_train_mask,
    simulate,
    simulator_of,
    tokens,
)
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import HALF, HALF_LOGITS, SIMULATOR, error
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

LIMIT = SIMULATOR[torch.float64]
PRESETS = ["paper", "exact"]


def a_simulator(preset: str = "exact", family: str = "opt", **changes: Any) -> Simulator:
    return simulate(
        FAMILIES[family](),
        SimulatorConfig.preset(preset, **{"inner_lr": 0.01, "steps": 2, **changes}),
    )


IDS, TRAIN = tokens(3, 11, 29), ragged_train_mask(3, 11)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_inference_mode(family: str, preset: str) -> None:
    simulator = a_simulator(preset, family)
    recorded = simulator(IDS, TRAIN)
    with torch.inference_mode():
        inferred = simulator(IDS, TRAIN)
    assert recorded.logits.requires_grad
    assert inferred.logits.is_inference()
    assert error(inferred.logits, recorded.logits) < LIMIT  # its kernels may be others


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outer_gradients(family: str, preset: str) -> None:
    """d loss / d inner_lr and a directional derivative over all prefix embeddings equal central
    differences.
    """
    simulator = a_simulator(preset, family)
    named = dict(simulator.prefix.named_parameters())

    def loss() -> Tensor:
        found = simulator(IDS, TRAIN, labels=IDS).loss
        assert found is not None
        return found

    gradients = torch.autograd.grad(loss(), [simulator.inner_lr, *named.values()])
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in gradients)
    directions = [
        torch.ones_like(simulator.inner_lr),
        *(torch.randn_like(p) for p in named.values()),
    ]
    # inner_lr alone, then all weights together
    for chosen in ([0], range(1, len(directions))):
        moved = [(simulator.inner_lr, *named.values())[i] for i in chosen]
        expected = sum(float((gradients[i] * directions[i]).sum()) for i in chosen)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, i in zip(moved, chosen, strict=True):
                    parameter.add_(directions[i], alpha=sign * 1e-6)
                sides.append(float(loss()))
                for parameter, i in zip(moved, chosen, strict=True):
                    parameter.add_(directions[i], alpha=-sign * 1e-6)
        difference = (sides[0] - sides[1]) / 2e-6
        assert abs(difference - expected) < 1e-5 * max(1.0, abs(expected))


@grid(family=FAMILIES, preset=PRESETS, dtype=[*HALF, torch.float32, torch.float64])
def test_dtypes(family: str, preset: str, dtype: torch.dtype) -> None:
    reference = a_simulator(preset, family, inner_lr=0.003)
    expected = reference(IDS, TRAIN, return_initial=True, labels=IDS)
    simulator = copy.deepcopy(reference).to(dtype)
    with torch.inference_mode():
        out = simulator(IDS, TRAIN, return_initial=True, labels=IDS)
        updates = simulator.updates(IDS, TRAIN)
        state = simulator.updated_state_dict(IDS, TRAIN)
    assert simulator.dtype == out.logits.dtype == out.initial_logits.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in updates.values()} == {wide}  # what is learned
    assert {state[name].dtype for name in updated_parameters(simulator)} == {wide}
    assert out.loss.dtype == out.initial_loss.dtype == wide
    limit = {**HALF_LOGITS, **SIMULATOR}[dtype]
    assert error(out.logits, expected.logits) < limit
    assert error(out.initial_logits, expected.initial_logits) < limit
    assert abs(float(out.loss.detach() - expected.loss.detach())) < limit * max(
        1, float(expected.loss.detach())
    )


def test_inner_lr_keeps_its_digits() -> None:
    simulator = simulate(opt(dtype=torch.float32), SimulatorConfig.paper(inner_lr=1.2345e-4))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        simulator.to(dtype)
        assert simulator.inner_lr.dtype == torch.float64
        assert float(simulator.inner_lr.detach()) == 1.2345e-4
        assert isinstance(simulator.inner_lr, torch.nn.Parameter)
    assert (
        simulator.half().prefix.model.decoder.layers.get_submodule("0").fc1.weight.dtype
        == torch.float16
    )
    assert simulate(opt(), SimulatorConfig.paper()).inner_lr.dtype == torch.float64
    assert (
        simulate(opt(dtype=torch.bfloat16), SimulatorConfig.paper()).inner_lr.dtype == torch.float64
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_target_leaves_the_model_alone(family: str, preset: str) -> None:
    """The first token is no target; neither is one that loss_mask removes."""
    simulator = a_simulator(preset, family)
    only_first = torch.zeros_like(TRAIN)
    only_first[:, 0] = 1
    expected = simulator.predict_initial(IDS)
    with pytest.warns(UserWarning, match="3 of 3 sequences have no training target"):
        assert error(simulator(IDS, only_first).logits, expected) < LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert error(simulator(IDS, TRAIN, loss_mask=only_first).logits, expected) < LIMIT
        assert (
            error(simulator(IDS, only_first, return_initial=True).initial_logits, expected) < LIMIT
        )
        state = simulator.updated_state_dict(IDS, only_first)
    weights = simulator.prefix.tensors()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_one_sequence_without_a_target_does_not_disturb_the_others() -> None:
    simulator = a_simulator()
    train = TRAIN.clone()
    train[1] = 0
    with pytest.warns(UserWarning, match="1 of 3"):
        out = simulator(IDS, train).logits
    assert error(out[[0, 2]], simulator(IDS[[0, 2]], train[[0, 2]]).logits) < LIMIT
    assert error(out[1], simulator.predict_initial(IDS)[1]) < LIMIT


def test_a_full_batch_warns_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulator = a_simulator()
        simulator(IDS, TRAIN)
        simulator.predict_initial(IDS)
        assert torch.isfinite(simulator.predict(simulator.updates(IDS, TRAIN), IDS)).all()


def test_a_sequence_that_is_all_padding_stays_finite() -> None:
    attention = torch.ones_like(IDS)
    attention[1] = 0
    simulator = a_simulator()
    with pytest.warns(UserWarning, match="1 of 3"):
        out = simulator(IDS, TRAIN, attention_mask=attention, return_initial=True)
    assert bool(out.logits.isfinite().all())
    assert error(out.logits[[0, 2]], simulator(IDS[[0, 2]], TRAIN[[0, 2]]).logits) < LIMIT


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("family", FAMILIES)
def test_predict_with_updates_equals_forward(family: str, scenario: str) -> None:
    config = SimulatorConfig.paper(inner_lr=0.01, steps=2)
    simulator, inputs = simulator_of(FAMILIES[family](), config), SCENARIOS[scenario](3, 11, 29)
    with torch.inference_mode():
        updates = simulator.updates(**inputs)
        rest = {
            name: inputs[name]
            for name in ("input_ids", "attention_mask", "position_ids")
            if name in inputs
        }
        assert error(simulator.predict(updates, **rest), simulator(**inputs).logits) < LIMIT
        initial = simulator(**inputs, return_initial=True).initial_logits
        assert error(simulator.predict_initial(**rest), initial) < LIMIT
    assert all(value.shape[0] == 3 for value in updates.values())
    slots = simulator.program.layout.prefix
    assert all(tuple(value.shape[1:]) == slots[slot].shape for slot, value in updates.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_sequences_do_not_see_each_other(preset: str) -> None:
    simulator = a_simulator(preset)
    together = simulator(IDS, TRAIN).logits
    for b in range(3):
        assert error(simulator(IDS[b : b + 1], TRAIN[b : b + 1]).logits[0], together[b]) < LIMIT
    assert error(simulator(IDS.flip(0), TRAIN.flip(0)).logits.flip(0), together) < LIMIT


def test_nothing_persists_between_calls() -> None:
    simulator = a_simulator()
    before = copy.deepcopy(simulator.state_dict())
    first = simulator(IDS, TRAIN).logits
    simulator(tokens(2, 5, 29, seed=4), torch.ones(2, 5))
    simulator.updated_state_dict(IDS, TRAIN)
    assert torch.equal(simulator(IDS, TRAIN).logits, first)
    assert all(torch.equal(before[name], value) for name, value in simulator.state_dict().items())


def test_losses() -> None:
    """Mean over the labels that are not -100; label t + 1 is predicted at t."""
    simulator = a_simulator()
    labels = IDS.clone()
    labels[0, :4], labels[1] = -100, -100
    out = simulator(IDS, TRAIN, labels=labels, return_initial=True)
    for logits, loss in ((out.logits, out.loss), (out.initial_logits, out.initial_loss)):
        chosen = [(b, t) for b in range(3) for t in range(10) if labels[b, t + 1] != -100]
        terms = [-F.log_softmax(logits[b, t], -1)[labels[b, t + 1]] for b, t in chosen]
        assert error(loss, torch.stack(terms).mean()) < LIMIT
    alone = simulator(IDS, TRAIN, labels=labels)
    assert alone.initial_loss is None
    assert error(alone.loss, out.loss) < LIMIT
    assert simulator(IDS, TRAIN).loss is None


@pytest.mark.parametrize(
    "wanted", [("logits",), ("logits", "initial_logits"), ("updates",), ("initial_logits",)]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_emitted_code_is_plain_torch(
    preset: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No `tint` operator, no operator overload, no autograd: functions of torch, and methods of
    tensors.
    """
    simulator = a_simulator(preset, "gpt2")
    program = simulator.emitted(wanted)
    assert "tint" not in program.code
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert not isinstance(node.target, torch._ops.OpOverload), node.target
            if node.target is getattr:
                assert node.args[1] in ("mT", "dtype"), node.args
            else:
                owners = (torch, F, operator)
                assert any(
                    getattr(owner, node.target.__name__, None) is node.target for owner in owners
                ), node.target
        else:
            assert node.op in ("placeholder", "output", "call_method"), node.op
            assert node.target not in ("backward", "requires_grad_", "item", "cpu", "tolist")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("autograd was called")

    for name in ("grad", "backward"):
        monkeypatch.setattr(torch.autograd, name, forbidden)
    monkeypatch.setattr(Tensor, "backward", forbidden)
    with torch.inference_mode():
        assert bool(simulator(IDS, TRAIN).logits.isfinite().all())


def test_emitted_programs_are_kept() -> None:
    simulator = a_simulator()
    assert simulator.emitted() is simulator.emitted()
    assert simulator.emitted(("updates",)) is not simulator.emitted()


def test_deepcopy_is_independent() -> None:
    simulator = a_simulator()
    expected = simulator(IDS, TRAIN).logits.detach()
    twin = copy.deepcopy(simulator)
    assert torch.equal(twin(IDS, TRAIN).logits, expected)
    assert torch.equal(
        twin.predict(twin.updates(IDS, TRAIN), IDS),
        simulator.predict(simulator.updates(IDS, TRAIN), IDS),
    )
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(simulator(IDS, TRAIN).logits, expected)
    assert not torch.equal(twin(IDS, TRAIN).logits, expected)


def test_state_dict_round_trip() -> None:
    """A simulator's state dict has the auxiliary names under `prefix`, and carries all that
    training from outside changes.
    """
    trained, fresh = (
        a_simulator(),
        simulate(opt(seed=5), SimulatorConfig.exact(inner_lr=0.5, steps=2)),
    )
    assert set(trained.state_dict()) == {
        "inner_lr",
        *(f"prefix.{name}" for name in trained.prefix.tensors()),
    }
    assert not torch.allclose(fresh(IDS, TRAIN).logits, trained(IDS, TRAIN).logits)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(fresh(IDS, TRAIN).logits, trained(IDS, TRAIN).logits)


def test_inner_lr_is_a_parameter_that_counts() -> None:
    simulator = a_simulator(inner_lr=0.01)
    with torch.no_grad():
        simulator.inner_lr.fill_(0.0)
    assert error(simulator(IDS, TRAIN).logits, simulator.predict_initial(IDS)) < LIMIT


@pytest.mark.slow
def test_torch_export_takes_a_whole_simulator() -> None:
    """Masks, inner steps and all, with dynamic batch and length; checks of values are skipped while
    it is traced.
    """
    simulator = a_simulator()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.simulator = simulator

        def forward(self, input_ids: Tensor, train_mask: Tensor) -> Tensor:
            return self.simulator(input_ids, train_mask).logits

    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        Logits(), (IDS, TRAIN), dynamic_shapes=(sizes, sizes), strict=False
    ).module()
    for rows, length in ((slice(None), None), (slice(2), 7)):
        ids, train = IDS[rows, :length], TRAIN[rows, :length]
        assert error(exported(ids, train), simulator(ids, train).logits) < LIMIT
