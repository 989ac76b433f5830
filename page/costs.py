"""What a call costs, by phase and operator, and how many parameters there are of each kind."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from tintc.compiler.cost import estimate
from tintc.compiler.lower_bound import TEXT
from tintc.compiler.node_costs import NodeCosts
from tintc.compiler.reports.breakdown import Row, rows
from tintc.compiler.reports.direct import direct_flops
from tintc.compiler.reports.parameters import parameter_report
from tintc.ir.call_sizes import CallSizes
from tintc.ir.dialect import AnyOperator, operator_of
from tintc.ir.inputs import is_models_own
from tintc.ir.node_meta import info
from tintc.runtime.simulator import Simulator


def cost_file(simulator: Simulator, sizes: CallSizes, lowered: NodeCosts) -> dict[str, Any]:
    """data/cost.json. lowered: what the nodes of the lowered graph cost. Sizes are those that
    reports tell.
    """
    program = simulator.program
    names = simulator.optimizations if simulator.structure is None else True
    cost = estimate(program, simulator.backend, simulator.dtype, optimize=names, **sizes)
    found = rows(simulator, sizes, optimize=names, lowered=lowered)
    weight_bytes = sum(p.numel() * p.element_size() for p in simulator.parameters())
    return {
        "parameters": parameter_report(simulator),
        "auxiliary": _auxiliary(simulator),
        "call": {
            "batch": sizes["batch"],
            "tokens": sizes["tokens"],
            "trained": sizes["segment"] + 1,  # the last one is a target only
        },
        "phases": [_phase(row) for row in found if row.calls],
        "flops": cost.flops,
        "direct_flops": direct_flops(program, sizes),
        "lower_bound": {"flops": round(sum(row.needed for row in found)), "text": TEXT},
        "weight_bytes": weight_bytes,
        "peak_bytes": weight_bytes + cost.peak_bytes,
    }


def _phase(row: Row) -> dict[str, Any]:
    return {
        "lane": row.phase,
        "operator": row.operator,
        "flops": row.flops,
        "bytes": row.bytes,
        "calls": row.calls,
    }


def _auxiliary(simulator: Simulator) -> list[dict[str, Any]]:
    """The model's own parameters, each with the kind of layer that reads it first."""
    kinds = _kinds(simulator.program.graph)
    return [
        {"name": name, "count": tensor.numel(), "kind": kinds.get(name, "other")}
        for name, tensor in simulator.prefix.tensors().items()
        if tensor.is_floating_point() and is_models_own(name)
    ]


def _kinds(graph: fx.Graph) -> dict[str, str]:
    """By parameter: the family of the first operator that computes with it."""
    readers: dict[str, set[AnyOperator]] = defaultdict(set)
    for placeholder in graph.find_nodes(op="placeholder"):
        name = info(placeholder).parameter
        for user in placeholder.users if name is not None else ():
            called = operator_of(user)
            reads = called is not None and called.kind == "read" and info(user).slot
            for node in user.users if reads else (user,):
                if (found := operator_of(node)) is not None:
                    readers[name or ""].add(found)
    return {name: _named(found) for name, found in readers.items()}


def _named(operators: set[AnyOperator]) -> str:
    """Of a forward operator where there is one: weights are read by backward passes too."""
    forward = {each.family for each in operators if each.kind in ("read", "forward")}
    return min(forward or {each.family for each in operators})
