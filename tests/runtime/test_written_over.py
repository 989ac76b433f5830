"""Own weights are written over where nothing else reads them: the same numbers to the bit, in less
memory, and never into a tensor that somebody else holds.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.support.grid import grid
from tests.support.models import opt, simulate, tokens
from tintc.compiler.cost import estimate
from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_descent
from tintc.ir.outputs import SLOTS, Output
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize import programs
from tintc.runtime.specialize.cost_model import SlotUse
from tintc.runtime.specialize.optimize import optimize
from tintc.runtime.specialize.written_over import written_over

RULES: dict[str, dict[str, Any]] = {
    "three": {"steps": 3},
    "looped": {"steps": 6},
    "momentum": {"steps": 6, "momentum": 0.9},
    "drift": {"steps": 6, "max_drift": 0.01},
    "everything": {"steps": 3, "train": "*"},
}


def simulator(dtype: torch.dtype = torch.float32, **rule: Any) -> Simulator:
    model = opt(positions=32, dtype=dtype)
    return simulate(model, SimulatorConfig.exact(**{"inner_lr": 0.01, **rule}))


def inputs() -> tuple[Tensor, Tensor]:
    return tokens(3, 20, 29), (torch.arange(20) < torch.tensor([[9], [12], [5]])).long()


@pytest.fixture(autouse=True)
def _own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotUse, "factors_win", lambda *_: False)


@grid(name=RULES, dtype=[torch.float64, torch.float32, torch.bfloat16])
def test_the_same_to_the_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = simulator(torch.float64, **RULES[name]).to(dtype)
    plain = copy.deepcopy(ours)
    with torch.inference_mode():
        found = ours.updates(*inputs())
        monkeypatch.setattr(programs, "written_over", lambda *_: frozenset())
        expected = plain.updates(*inputs())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[slot], expected[slot]) for slot in expected)
        assert torch.equal(ours(*inputs()).logits, plain(*inputs()).logits)


@grid(name=["looped", "momentum"], dtype=[torch.float64, torch.float32])
def test_what_others_hold_stays_as_it_is(name: str, dtype: torch.dtype) -> None:
    sim = simulator(torch.float64, **RULES[name]).to(dtype)
    weights = {name: w.detach().clone() for name, w in sim.prefix.tensors().items()}
    ids, mask = inputs()
    with torch.inference_mode():
        held = sim.updates(ids, mask)
        before = {slot: value.clone() for slot, value in held.items()}
        sim.updates(ids.flip(0), mask)
        sim.predict(held, ids)
        adapted = sim.adapt(ids, mask)
        adapted(ids)
    stream = sim.stream(3, chunk=8, context=4)
    stream.step(ids[:, :8])
    state = {name: value.clone() for name, value in stream.state_dict().items()}
    copied = copy.deepcopy(stream)
    copied.step(ids[:, 8:14])
    assert all(torch.equal(held[slot], before[slot]) for slot in held)
    assert all(torch.equal(value, state[name]) for name, value in stream.state_dict().items())
    tensors = sim.prefix.tensors()
    assert all(torch.equal(tensors[name], weight) for name, weight in weights.items())


def descents(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """By step."""
    found: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_tint(node, linear_descent):
            found.setdefault(info(node).step, []).append(node)
    return found


class TestWhich:
    def graph(self, choices: Choices, **rule: Any) -> fx.Graph:
        return optimize(simulator(torch.float64, **rule).program, choices)

    def test_all_but_the_first_step_which_reads_shared_weights(self) -> None:
        choices = Choices((Output.LOGITS,), differentiable=False)
        graph = self.graph(choices, steps=3)
        by_step = descents(graph)
        over = written_over(graph, choices)
        assert over == {node for step in (1, 2) for node in by_step[step]}
        assert by_step[0]

    def test_none_that_somebody_differentiates(self) -> None:
        choices = Choices((Output.LOGITS,), differentiable=True)
        assert not written_over(self.graph(choices, steps=3), choices)

    @pytest.mark.parametrize("donated", [True, False])
    def test_what_a_caller_gives_only_if_he_gives_it_away(self, donated: bool) -> None:
        choices = Choices(SLOTS, from_states=True, donated=donated, differentiable=False)
        graph = self.graph(choices, steps=6)
        every = {node for nodes in descents(graph).values() for node in nodes}
        assert written_over(graph, choices) == (every if donated else frozenset())

    def test_none_that_is_read_later_or_returned(self) -> None:
        choices = Choices((Output.LOGITS,), differentiable=False)
        graph = self.graph(choices, steps=2)
        first, second = descents(graph)[0][0], None
        second = next(node for node in descents(graph)[1] if node.args[0] is first)
        assert second in written_over(graph, choices)
        output = graph.output_node()
        output.args = ({**output.args[0], "updates": {"held": first}},)  # type: ignore[dict-item]
        assert second not in written_over(graph, choices)


def test_a_loop_holds_one_copy_of_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = simulator(torch.float32, steps=6)
    own = sum(4 * v[0].numel() for v in sim.updates(*inputs()).values() if v.ndim == 3)
    size: dict[str, Any] = {"batch": 1, "tokens": 4, "segment": 2}
    ours = estimate(sim.program, "fused", torch.float32, **size).peak_bytes
    monkeypatch.setattr(programs, "written_over", lambda *_: frozenset())
    plain = estimate(sim.program, "fused", torch.float32, **size).peak_bytes
    assert plain - ours > 0.5 * own  # activations are most of such a small model
