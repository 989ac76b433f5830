"""The pruned copy of a lowered graph, and which optimizations run on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import fx

from tests.support.models import opt, simulate, tokens
from tests.support.optimized import calls, results
from tests.support.stages import Stage, printed, stage
from tests.support.tolerances import error
from tintc.ir.builder import outputs
from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.errors import UsageError
from tintc.ir.node_meta import KEY, info
from tintc.ir.outputs import Output
from tintc.ir.pass_manager import Pass
from tintc.ir.program import Program
from tintc.passes.specializing import OPTIMIZATION_NAMES, OPTIMIZATIONS
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.cost_model import slot_uses
from tintc.runtime.specialize.optimize import check_names, copy_graph, optimize

EXACT = SimulatorConfig.exact(inner_lr=0.01, steps=2)


def lowered(config: SimulatorConfig = EXACT) -> tuple[Stage, Program]:
    at = stage("verify", config)
    assert at.context.layout is not None
    return at, Program(at.graph, config, at.context.facts, at.context.layout)


def optimized(
    outputs: tuple[str, ...] = ("logits",), config: SimulatorConfig = EXACT, **facts: Any
) -> Stage:
    at, program = lowered(config)
    choices = Choices(tuple(map(Output, outputs)), **{"dtype": torch.float64, **facts})
    context = Context(
        config,
        at.context.tensors,
        tables=at.context.tables,
        facts=at.context.facts,
        choices=choices,
    )
    return Stage(optimize(program, choices), context)


def returned(graph: fx.Graph) -> dict[str, Any]:
    found = graph.output_node().args[0]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "wanted",
    [("logits",), ("initial_logits",), ("updates",), ("logits", "initial_logits"), ("losses",)],
)
def test_keeps_what_is_wanted(wanted: tuple[str, ...]) -> None:
    """And nothing that only others need."""
    at = optimized(wanted)
    assert tuple(returned(at.graph)) == wanted
    assert all(node.users for node in at.graph.nodes if node.op == "call_function")
    assert bool(calls(at, "linear_descent")) is (wanted != ("initial_logits",))
    assert bool(calls(at, "token_losses")) is (wanted == ("losses",))


def test_the_program_stays_as_it_is() -> None:
    """Its graph is read again by every other kind of call."""
    at, program = lowered()
    before, infos = (
        printed(at.graph),
        {node.name: node.meta[KEY] for node in at.graph.nodes if KEY in node.meta},
    )
    enabled = frozenset(OPTIMIZATION_NAMES)
    for wanted in (Output.LOGITS, Output.LOSSES, Output.UPDATES):
        choices = Choices(
            (wanted,),
            enabled=enabled,
            differentiable=False,
            causal=True,
            low_rank=frozenset(slot_uses(at.graph)),
        )
        assert printed(optimize(program, choices)) != before
    assert printed(at.graph) == before
    assert all(node.meta[KEY] is infos[node.name] for node in at.graph.nodes if KEY in node.meta)


def test_copies_have_records_of_their_own() -> None:
    at, _ = lowered()
    copied = copy_graph(at.graph)
    assert printed(copied) == printed(at.graph)
    for old, new in zip(at.graph.nodes, copied.nodes, strict=True):
        if KEY in old.meta:
            assert new.meta[KEY] == old.meta[KEY]
            assert new.meta[KEY] is not old.meta[KEY]


def test_given_updates_are_inputs() -> None:
    """The program behind `predict` reads the slots' values and trains nothing."""
    at = optimized(("logits",), from_updates=True)
    slots = set(outputs(lowered()[0].graph)["updates"])
    given = {
        info(node).slot: node
        for node in at.graph.nodes
        if node.op == "placeholder" and node.name.endswith("_given")
    }
    assert set(given) == slots
    assert all(info(node).role == "input" and info(node).shape[0] == "B" for node in given.values())
    assert not [
        name
        for name in ("linear_descent", "bias_descent", "norm_descent", "loss_gradient")
        if calls(at, name)
    ]


@pytest.mark.parametrize("one", [step.name for step in OPTIMIZATIONS])
def test_only_enabled_ones_run(one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def noted(step: Pass) -> Pass:
        def run(graph: fx.Graph, context: Context) -> fx.Graph:
            ran.append(step.name)
            return step.run(graph, context)

        return dataclasses.replace(step, run=run)

    monkeypatch.setattr(
        "tintc.runtime.specialize.optimize.OPTIMIZATIONS", tuple(map(noted, OPTIMIZATIONS))
    )
    optimized(enabled=frozenset({one, "batch_slices"}))
    assert ran == [one]
    ran.clear()
    optimized(enabled=frozenset(OPTIMIZATION_NAMES))
    assert ran == [step.name for step in OPTIMIZATIONS]


@pytest.mark.parametrize(
    "config", [EXACT, SimulatorConfig.paper(inner_lr=0.01, layers=1)], ids=["exact", "paper"]
)
def test_same_numbers(config: SimulatorConfig) -> None:
    """The whole lowered graph, pruned graphs, and optimized ones return the same."""
    wanted = ("logits", "initial_logits", "updates")
    expected = results(optimized(wanted, config))
    low_rank = frozenset(slot_uses(lowered(config)[0].graph))
    enabled = {
        "enabled": frozenset(OPTIMIZATION_NAMES),
        "differentiable": False,
        "causal": True,
        "low_rank": low_rank,
    }
    found = results(optimized(wanted, config, **enabled))
    assert set(found) == set(expected)
    assert {key: e for key in expected if not (e := error(found[key], expected[key])) < 1e-10} == {}


def test_names() -> None:
    assert check_names(True) == OPTIMIZATION_NAMES
    assert check_names(False) == check_names(()) == ()
    assert check_names(["batch_slices", "causal_attention"]) == (
        "causal_attention",
        "batch_slices",
    )  # in the order in which they run
    with pytest.raises(
        UsageError,
        match=f"there is no optimization nonsense, speed; they are {', '.join(OPTIMIZATION_NAMES)}",
    ):
        check_names(["nonsense", "chunk_head", "speed"])


def test_squares_of_weights_are_made_once_and_follow_the_weights() -> None:
    """|W_0|^2, which max_drift compares a change with: changed weights have another."""
    config = SimulatorConfig.exact(inner_lr=0.05, steps=2, max_drift=0.01)
    found, ids = simulate(opt(), config), tokens(2, 9, 29)
    name = "model.decoder.layers.0.fc1.weight"
    with torch.inference_mode():
        before = found(ids, torch.ones_like(ids)).logits
    with torch.no_grad():
        found.prefix.get_parameter(name).mul_(3)
    changed = Simulator(found.program, found.prefix.tensors(), optimize=False)
    with torch.inference_mode():
        after = found(ids, torch.ones_like(ids)).logits
        assert error(after, changed(ids, torch.ones_like(ids)).logits) < 1e-10
    assert error(after, before) > 1e-3
    gradients = []
    for sim in (found, changed):  # of a call that somebody differentiates nothing is kept
        logits = sim(ids, torch.ones_like(ids)).logits
        gradients.append(torch.autograd.grad(logits.sum(), sim.prefix.get_parameter(name))[0])
    assert error(*gradients) < 1e-9
