"""What the optimizations' tests share: a pruned graph of one kind of call, one optimization
applied, and its numbers as emitted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.support.stages import Stage, flat, inputs, printed, stage
from tests.support.tolerances import error
from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.node_meta import info
from tintc.ir.outputs import Output
from tintc.ir.pass_manager import Pass, run_passes
from tintc.ir.program import Program
from tintc.runtime.backends import fused
from tintc.runtime.specialize.cost_model import slot_uses
from tintc.runtime.specialize.optimize import copy_graph, optimize

LIMIT = 1e-10


def pruned(
    config: SimulatorConfig | None = None,
    *before: Pass,
    layers: int = 2,
    model: nn.Module | None = None,
    outputs: tuple[str, ...] = ("logits",),
    longest: int | None = None,
    **facts: Any,
) -> Stage:
    """The graph that an optimization gets, after those in `before`: of the hand-written decoder
    unless a model is given, for a CPU call without masks in float64 that nobody differentiates,
    with every slot's updates as factors. facts: other fields of Choices."""
    at = stage("verify", config, layers=layers, model=model, longest=longest)
    assert at.context.layout is not None
    uses = frozenset(slot_uses(at.graph))
    known = {
        "dtype": torch.float64,
        "differentiable": False,
        "causal": True,
        "low_rank": uses,
        **facts,
    }
    choices = Choices(tuple(map(Output, outputs)), **known)
    graph = optimize(
        Program(at.graph, at.context.config, at.context.facts, at.context.layout), choices
    )
    old = at.context
    context = Context(
        old.config, old.tensors, old.constants, old.facts, old.tables, old.layout, choices
    )
    return Stage(run_passes(graph, context, before), context)


def optimized(step: Pass, at: Stage) -> Stage:
    """The same after one optimization, contract checked; `at` stays as it is."""
    return Stage(run_passes(copy_graph(at.graph), at.context, [step], verify_each=True), at.context)


def results(at: Stage, given: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """What the fused back end's program of a graph returns, by name."""
    dtype = at.context.choices.dtype
    vocab = at.context.facts.vocab_size
    known = inputs(batch=3, vocab=vocab) if given is None else given
    # Training passes see what holds targets; logits before the update are of what they see.
    initial = any(kind.is_before for kind in at.context.choices.outputs)
    known = {
        **known,
        "segment": known["input_ids"].shape[1] if initial else 4,
        "labels": known["targets"],
    }
    owned = {**at.context.tensors, **at.context.tables}
    parameters = {node.name: name for node in at.graph.nodes if (name := info(node).parameter)}
    module = fused.emit(at.graph, dtype)
    values = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = owned[parameters[node.name]] if node.name in parameters else known[node.name]
        is_number = (
            isinstance(value, Tensor) and value.is_floating_point() and node.name != "inner_lr"
        )
        values.append(value.to(dtype) if is_number else value)
    with torch.no_grad():
        found = module(*values)
    return flat(found) if "updates" in found and "initial_logits" in found else _named(found)


def _named(found: dict[str, Any]) -> dict[str, Tensor]:
    updates = {f"updates.{name}": value for name, value in found.get("updates", {}).items()}
    return {**{name: value for name, value in found.items() if name != "updates"}, **updates}


def assert_same_results(step: Pass, at: Stage, limit: float = LIMIT) -> Stage:
    """The pass changes something, but nothing that the emitted program returns. Gives the graph
    after it.
    """
    after = optimized(step, at)
    assert printed(after.graph) != printed(at.graph), "the pass did nothing"
    expected, found = results(at), results(after)
    assert set(found) == set(expected)
    assert {key: e for key in expected if not (e := error(found[key], expected[key])) < limit} == {}
    return after


def assert_left_alone(step: Pass, at: Stage) -> None:
    assert printed(optimized(step, at).graph) == printed(at.graph)


def calls(at: Stage, name: str) -> list[fx.Node]:
    """The calls of `tint::name`, in order."""
    return [
        node
        for node in at.graph.nodes
        if node.op == "call_function" and str(node.target) == f"tint.{name}.default"
    ]


def exact(**changes: Any) -> SimulatorConfig:
    return SimulatorConfig.exact(**{"inner_lr": 0.01, **changes})


def paper(**changes: Any) -> SimulatorConfig:
    return SimulatorConfig.paper(**{"inner_lr": 0.01, **changes})
