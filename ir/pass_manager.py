"""Runs passes in order, checks their contracts, logs what each changed, and stops after any of
them.

A pass is `graph, context -> graph`, in a file of its own under `passes/`, declared with
`graph_pass`. Its contract names properties (see `contracts.py`): those in `requires` must hold
before, those in `ensures` after.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.contracts import check_property
from tintc.ir.errors import CompilerBug
from tintc.ir.facts import ModelFacts
from tintc.ir.layout import Layout

_LOG = logging.getLogger("tintc.passes")


@dataclass
class Context:
    """What all passes share. tensors: the auxiliary state dict; of parameters only shapes are read.
    constants: values of placeholders outside the state dict, which masks and positions are computed
    from. tables: position tables that passes computed, by the names of `inputs.table_name`. layout:
    set by the slot passes. choices: what one emitted program may count on; of optimizations
    only."""

    config: SimulatorConfig
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    facts: ModelFacts = field(default_factory=ModelFacts)
    tables: dict[str, Tensor] = field(default_factory=dict)
    layout: Layout | None = None
    choices: Choices = field(default_factory=Choices)


PassFunction = Callable[[fx.Graph, Context], fx.Graph]


@dataclass(frozen=True)
class Pass:
    """A named graph rewrite with its contract."""

    name: str
    run: PassFunction
    requires: tuple[str, ...]
    ensures: tuple[str, ...]

    def __call__(self, graph: fx.Graph, context: Context) -> fx.Graph:
        return self.run(graph, context)


def graph_pass(
    *, requires: Sequence[str] = (), ensures: Sequence[str] = ()
) -> Callable[[PassFunction], Pass]:
    """Declares a pass and its contract."""

    def declare(function: PassFunction) -> Pass:
        return Pass(function.__name__, function, tuple(requires), tuple(ensures))

    return declare


def run_passes(
    graph: fx.Graph,
    context: Context,
    pipeline: Sequence[Pass],
    *,
    stop_after: str | None = None,
    verify_each: bool | None = None,
    on_pass: Callable[[str, fx.Graph], None] | None = None,
) -> fx.Graph:
    """Applies the passes in order to the graph, in place, and returns it.

    stop_after: name of the last pass to run. verify_each: also check `well_formed` and
    `shapes_agree` after each pass (default: when TINTC_VERIFY=1); the contract of the pass itself
    is always checked.
    on_pass: called with each pass's name and result. Raises CompilerBug when a contract does not
    hold.
    """
    if verify_each is None:
        verify_each = os.environ.get("TINTC_VERIFY") == "1"
    if stop_after is not None and stop_after not in (names := [p.name for p in pipeline]):
        raise CompilerBug(f"stop_after={stop_after!r} is not in the pipeline: {', '.join(names)}")
    for step in pipeline:
        before = _operator_counts(graph)
        _check(step, "requires", step.requires, graph, context)
        graph = step(graph, context)
        _check(step, "ensures", step.ensures, graph, context)
        if verify_each:
            _check(step, "keeps", ("well_formed", "shapes_agree"), graph, context)
        _log_difference(step.name, before, _operator_counts(graph))
        if on_pass is not None:
            on_pass(step.name, graph)
        if step.name == stop_after:
            break
    return graph


def _check(step: Pass, verb: str, properties: Sequence[str], graph: fx.Graph, context: Any) -> None:
    for name in properties:
        problems = check_property(name, graph, context)
        if problems:
            raise CompilerBug(
                f"pass {step.name} {verb} {name}, which does not hold: " + "; ".join(problems[:5])
            )


def _operator_counts(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def _log_difference(name: str, before: Counter[str], after: Counter[str]) -> None:
    changes = [
        f"{after[op] - before[op]:+d} {op}"
        for op in sorted(before | after)
        if after[op] != before[op]
    ]
    _LOG.info("%s: %s", name, ", ".join(changes) or "no change")
