"""What a call costs by phase and operator, and beside it what the mathematics asks for.

rows of what runs  (phase, operator): FLOPs, bytes, calls
+ FLOPs that no program does without, each by the row of the operators that compute it
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tintc.compiler.lower_bound import TEXT, Needed, needed, repeats, wanted_graph
from tintc.compiler.node_costs import NodeCosts, emitted_costs, graph_costs
from tintc.compiler.reports.direct import direct_flops
from tintc.ir.call_sizes import CallSizes, Predict
from tintc.ir.choices import Choices
from tintc.ir.dialect import AnyOperator, operator_of
from tintc.ir.lanes import lane
from tintc.ir.node_meta import info
from tintc.ir.ops import OPERATORS
from tintc.ir.ops.states import orthogonal
from tintc.ir.outputs import SLOTS, Output
from tintc.ir.program import Program
from tintc.ir.records import NodeRecord, to_records
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.optimize import optimize as optimized_graph
from tintc.runtime.specialize.programs import Programs


@dataclass
class Row:
    """All calls of one operator in one phase of a call; a loop over steps counts all of them in the
    phases of step 0. needed: FLOPs that no program does without, of what the operator computes.
    """

    phase: str
    operator: str
    flops: int = 0
    bytes: int = 0
    calls: int = 0
    needed: float = 0.0


class Ran(NamedTuple):
    """A graph that a call runs, what its nodes cost, and how often it runs."""

    records: list[NodeRecord]
    costs: NodeCosts
    times: int


def rows(
    simulator: Simulator,
    sizes: CallSizes,
    *,
    optimize: bool | Collection[str] = True,
    predict: Predict = "all",
    lowered: NodeCosts | None = None,
) -> list[Row]:
    """In the order of the program, without what costs nothing. optimize: names of optimizations of
    the fused back end. predict: positions whose logits are wanted. lowered: costs of the lowered
    graph, where they are known.
    """
    program = simulator.program
    ran = (
        list(_fused(program, simulator.dtype, optimize, sizes, predict))
        if simulator.structure is None
        else [_transformer(simulator, sizes)]
    )
    found = _Rows(program, loops=simulator.structure is not None)
    for part in ran:
        found.add(part)
    graph = wanted_graph(program, predict)
    if lowered is None:
        lowered = graph_costs(graph, simulator.dtype, sizes)
    for each in needed(program, lowered, sizes, graph):
        found.give(each)
    return found.in_order()


def breakdown(
    simulator: Simulator,
    sizes: CallSizes,
    *,
    optimize: bool | Collection[str] = True,
    predict: Predict = "all",
) -> dict[str, Any]:
    """What `tintc cost --breakdown` tells, for JSON. Sums are those of all phases."""
    found = rows(simulator, sizes, optimize=optimize, predict=predict)
    counted = [row for row in found if row.flops or row.needed]
    phases = list(dict.fromkeys(row.phase for row in counted))
    return {
        "phases": [_phase(name, [row for row in counted if row.phase == name]) for name in phases],
        "flops": sum(row.flops for row in found),
        "lower_bound": round(sum(row.needed for row in found)),
        "direct_flops": direct_flops(simulator.program, sizes),
        "lower_bound_is": TEXT,
    }


def _phase(name: str, found: Sequence[Row]) -> dict[str, Any]:
    operators = [
        {
            "operator": row.operator,
            "calls": row.calls,
            "flops": row.flops,
            "lower_bound": round(row.needed),
        }
        for row in found
    ]
    return {
        "phase": name or "shared",
        "flops": sum(row.flops for row in found),
        "lower_bound": round(sum(row.needed for row in found)),
        "operators": operators,
    }


def _fused(
    program: Program,
    dtype: torch.dtype,
    names: bool | Collection[str],
    sizes: CallSizes,
    predict: Predict,
) -> Iterator[Ran]:
    """The graph of `tint` operators; of a loop over steps those of the first, of one of the others
    and of the prediction.
    """
    some = predict == "rest"
    plain = Choices((Output.LOGITS,), differentiable=False, causal=True, some_tokens=some)
    programs, weight = Programs(program, None, names), torch.empty(1, dtype=dtype)
    kinds = [(plain, 1)]
    if program.config.looped:
        shared = programs.shares_frozen
        step = replace(plain, outputs=SLOTS, some_tokens=False)
        first = replace(step, outputs=(*SLOTS, Output.FROZEN)) if shared else step
        later = replace(step, from_states=True, frozen=shared)
        last = replace(plain, from_updates=True, frozen=shared and not program.facts.by_length)
        kinds = [(first, 1), (later, program.config.steps - 1), (last, 1)]
    elif program.apart:
        whole = programs.choose(plain, weight, sizes["tokens"], sizes["segment"])
        plain = replace(plain, factored=programs.handed_over(whole))
        trained = replace(plain, outputs=(Output.UPDATES,), some_tokens=False)
        kinds = [(trained, 1), (replace(plain, from_updates=True), 1)]
    steps = program.config.unrolled_steps
    for kind, times in kinds:
        chosen = programs.choose(kind, weight, sizes["tokens"], sizes["segment"])
        graph = optimized_graph(program, chosen)
        yield Ran(to_records(graph), graph_costs(graph, dtype, sizes, steps=steps), times)


def _transformer(simulator: Simulator, sizes: CallSizes) -> Ran:
    graph = simulator.emitted(differentiable=False).graph
    return Ran(to_records(graph), emitted_costs(simulator, sizes), 1)


_OF_UPDATES = ("low_rank", "descent", "token_products", "low_rank_of_scores")


class _Place(NamedTuple):
    """FLOPs of one node, and the row that counts them."""

    step: int
    phase: str
    row: Row
    flops: int


class _Rows:
    """Rows as they grow. loops: a graph that ran holds one step of all that there are."""

    def __init__(self, program: Program, *, loops: bool) -> None:
        self.program, self.loops = program, loops
        self.steps = program.config.unrolled_steps
        self.found: dict[tuple[str, str], Row] = {}
        # (module, kind) -> what computes
        self.places: dict[tuple[str, str], list[_Place]] = defaultdict(list)

    def in_order(self) -> list[Row]:
        """By phases as they begin in the program."""
        phases = list(dict.fromkeys(row.phase for row in self.found.values()))
        return sorted(self.found.values(), key=lambda row: phases.index(row.phase))

    def add(self, ran: Ran) -> None:
        for record in ran.records:
            cost, about = ran.costs.get(record.name), record.info
            if cost is None or not (cost.flops or cost.bytes):
                continue
            phase, step = about.get("phase"), about.get("step")
            times = ran.times * (repeats(self.program, phase, step) if self.loops else 1)
            row = self._row(lane(phase, step, self.steps), record.operator)
            row.flops += times * cost.flops
            row.bytes += times * cost.bytes
            row.calls += times
            if cost.flops:
                of = str(about.get("module", "")), _kind(_named(record))
                self.places[of].append(_Place(step or 0, str(phase), row, times * cost.flops))

    def give(self, need: Needed) -> None:
        """To the rows whose operators compute it: of this module, and best of its step and phase. A
        head's logits may be made on the way back; an update is that of all steps, and stays factors
        where these are read.
        """
        about = info(need.node)
        kind = _kind(operator_of(need.node))
        known = self.places.get((about.module, kind), [])
        if kind != "update":
            of_step = [each for each in known if each.step == (about.step or 0)]
            of_phase = [each for each in of_step if each.phase == about.phase]
            known = of_phase or of_step or known
        total = sum(each.flops for each in known)
        for each in known:
            each.row.needed += need.flops * each.flops / total
        if not known and need.flops:
            self._row(lane(about.phase, about.step, self.steps), "").needed += need.flops

    def _row(self, phase: str, operator: str) -> Row:
        return self.found.setdefault((phase, operator), Row(phase, operator))


def _named(record: NodeRecord) -> AnyOperator | None:
    return OPERATORS.get(record.operator.removeprefix("tint."))


def _kind(operator: AnyOperator | None) -> str:
    """What an operator computes: attention, an update or what stands for one, another part of the
    inner rule, or another product. Modules of the transformer are none of these.
    """
    if operator is None:
        return ""
    if operator.family == "attention":
        return operator.family
    of_update = operator.kind == "descent" or operator.family in ("low_rank", "rates")
    if of_update or operator.name.removeprefix("onednn_") in _OF_UPDATES:
        return "update"
    return "rule" if operator is orthogonal else "product"
