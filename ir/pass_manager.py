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
from dataclasses import dataclass

from torch import fx

from tintc.ir.context import Access, Context
from tintc.ir.contracts import check_property
from tintc.ir.errors import CompilerBug

_LOG = logging.getLogger("tintc.passes")
# Dear to check, of all nodes: after each pass they took a quarter of a program's first call.
_OF_THE_WHOLE = ("well_formed", "shapes_agree")


PassFunction = Callable[[fx.Graph, Context], fx.Graph]


@dataclass(frozen=True)
class Pass:
    """A named graph rewrite with its contract."""

    name: str
    run: PassFunction
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    access: Access

    def __call__(self, graph: fx.Graph, context: Context) -> fx.Graph:
        with context.acting(self.access):
            return self.run(graph, context)


def graph_pass(
    *,
    requires: Sequence[str] = (),
    ensures: Sequence[str] = (),
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
) -> Callable[[PassFunction], Pass]:
    """Declares a pass, its contract, and the facts that it reads and writes."""

    def declare(function: PassFunction) -> Pass:
        name = function.__name__
        access = Access(name, frozenset(reads), frozenset(writes))
        return Pass(name, function, tuple(requires), tuple(ensures), access)

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

    stop_after: name of the last pass to run. verify_each: check `well_formed` and `shapes_agree`
    after each pass, whether its contract names them or not (default: when TINTC_VERIFY=1); else
    what was ensured of the two is checked once, after the last pass. The rest of each contract is
    always checked. on_pass: called with each pass's name and result. Raises CompilerBug when a
    contract does not hold.
    """
    if verify_each is None:
        verify_each = os.environ.get("TINTC_VERIFY") == "1"
    if stop_after is not None and stop_after not in (names := [p.name for p in pipeline]):
        raise CompilerBug(f"stop_after={stop_after!r} is not in the pipeline: {', '.join(names)}")
    told, promised = _LOG.isEnabledFor(logging.INFO), set[str]()
    holds = frozenset[str]()  # what the pass before was seen to ensure, or said
    for step in pipeline:
        before = _operator_counts(graph) if told else Counter()
        _check(step, "requires", [p for p in step.requires if p not in holds], graph, context)
        graph = step(graph, context)
        once = () if verify_each else [p for p in _OF_THE_WHOLE if p in step.ensures]
        promised.update(once)
        _check(step, "ensures", [p for p in step.ensures if p not in once], graph, context)
        kept = _OF_THE_WHOLE if verify_each else ()
        _check(step, "keeps", [p for p in kept if p not in step.ensures], graph, context)
        holds = frozenset({*step.ensures, *kept})
        if told:
            _log_difference(step.name, before, _operator_counts(graph))
        if on_pass is not None:
            on_pass(step.name, graph)
        if step.name == stop_after:
            break
    _check_promised(pipeline, promised, graph, context)
    return graph


def _check_promised(
    pipeline: Sequence[Pass], promised: set[str], graph: fx.Graph, context: Context
) -> None:
    for name in sorted(promised):
        problems = check_property(name, graph, context)
        if problems:
            ensuring = ", ".join(step.name for step in pipeline if name in step.ensures)
            raise CompilerBug(
                f"{name} does not hold after a pipeline in which {ensuring} ensure it: "
                + "; ".join(problems[:5])
                + "; TINTC_VERIFY=1 says after which pass"
            )


def _check(
    step: Pass, verb: str, properties: Sequence[str], graph: fx.Graph, context: Context
) -> None:
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
