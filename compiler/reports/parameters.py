"""Counts a simulator's parameters, by what they are for: `Simulator.parameter_report`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from tintc.compiler.report_types import Modules, ParameterReport, Part
from tintc.ir.inputs import is_models_own
from tintc.runtime.backends.transformer.emit import tables
from tintc.runtime.backends.transformer.pages import PrefixPages
from tintc.runtime.backends.transformer.structure import SHARES, Structure, Use, check_backend
from tintc.runtime.simulator import Simulator


def parameter_report(simulator: Simulator, share: str | None = None) -> ParameterReport:
    """What every parameter is for, as JSON values. `total` is sum(p.numel() for p in
    simulator.parameters()).

    share: the way of sharing to count for; default the simulator's own, which is what it holds.
    parts: {name, count, formula} of prefix numbers (auxiliary weights as prefix embeddings, padding
    included), tables (token and position embeddings, the head), structural constants, the position
    code and the inner learning rate; their counts add up.
    structure: one row for each kind of module: phase, operator, module, formula, sizes, numbers (of
    one copy), uses, copies, count.
    by_phase: the same, summed. shares: the total under each way of sharing. auxiliary: parameters
    of the auxiliary model. passes: how often forward, backward and descent run. backend, share:
    what was counted.

    Raises UsageError for an unknown share, or one that the back end does not have.
    """
    share = share or simulator.share
    check_backend(simulator.backend, share)
    structure, steps = simulator.structure, simulator.config.steps
    parts = _parts(simulator, share)
    total = sum(part["count"] for part in parts)
    rows = [] if structure is None else _rows(structure, share)

    def in_phase(phase: str) -> int:
        return sum(row["count"] for row in rows if row["phase"] == phase)

    return {
        "backend": simulator.backend,
        "share": share,
        "auxiliary": sum(
            t.numel()
            for name, t in simulator.prefix.tensors().items()
            if t.is_floating_point() and is_models_own(name)
        ),
        "total": total,
        "parts": parts,
        "structure": rows,
        "by_phase": {
            "forward": in_phase("forward"),
            "backward": in_phase("backward"),
            "descent": in_phase("descent"),
        },
        "shares": {}
        if structure is None
        else {s: total - structure.numbers(share) + structure.numbers(s) for s in SHARES},
        "passes": {"forward": steps + 1, "backward": steps, "descent": steps},
    }


def _parts(simulator: Simulator, share: str) -> list[Part]:
    layout, prefix, structure = simulator.program.layout, simulator.prefix, simulator.structure
    if isinstance(prefix, PrefixPages):
        held, formula = (
            _count(prefix.pages),
            f"pages * K * D_sim = {layout.pages} * {layout.prefix_tokens} * {layout.sim_hidden}",
        )
    else:
        placed = {slot.parameter for slot in layout.prefix.values()} - set(
            tables(simulator.program)
        )
        held = sum(
            parameter.numel() for name, parameter in prefix.named_parameters() if name in placed
        )
        formula = "as they are: this back end pads nothing"
    named = "weights in prefix slots" if structure is None else "prefix numbers"
    parts: list[Part] = [
        {"name": named, "count": held, "formula": formula},
        {
            "name": "tables",
            "count": _count(prefix) - held,
            "formula": "embeddings, head and what else no prefix slot holds",
        },
    ]
    if structure is not None:
        parts += [
            {
                "name": "structural constants",
                "count": structure.numbers(share) - structure.code.numel(),
                "formula": "rows below",
            },
            {
                "name": "position code",
                "count": structure.code.numel(),
                "formula": f"(K + 1) * 2 d, d = {layout.head_width}",
            },
        ]
    return [*parts, {"name": "inner learning rate", "count": 1, "formula": "1"}]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rows(structure: Structure, share: str) -> list[Modules]:
    """Uses that have the same kind and size of module, in order of their first one. copies:
    different modules among them.
    """
    alike: dict[Any, list[Use]] = defaultdict(list)
    for use in structure.uses:
        alike[use.phase, use.operator, use.module, use.formula, tuple(use.sizes.items())].append(
            use
        )
    rows: list[Modules] = []
    counted: set[str] = set()
    for (phase, operator, module, formula, sizes), uses in alike.items():
        owners = {
            use.owners[share] for use in uses
        } - counted  # what an earlier row shares is counted there
        counted |= owners
        numbers = uses[0].numbers
        rows.append(
            {
                "phase": phase,
                "operator": operator,
                "module": module,
                "formula": formula,
                "sizes": dict(sizes),
                "numbers": numbers,
                "uses": len(uses),
                "copies": len(owners),
                "count": len(owners) * numbers,
            }
        )
    return rows
