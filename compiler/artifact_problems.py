"""Why a program that was read from an artifact is no lowered one, or does not fit its weights.

Values have the types of `artifact_schema.py` by now. Nothing runs before no problem is left.
"""

from __future__ import annotations

import math

from torch import Tensor

from tintc.compiler.gradient_statistics import is_root_mean_square
from tintc.ir.builder import outputs
from tintc.ir.context import Context
from tintc.ir.contracts import check_property
from tintc.ir.inputs import is_wide_table, statistics_of
from tintc.ir.layout import PrefixSlot
from tintc.ir.node_meta import info
from tintc.ir.program import Program
from tintc.passes.place.verify import LOWERED

_LARGEST_STEPS = 10_000  # each is unrolled in the graph
Problems = list[str]


def graph_problems(program: Program) -> Problems:
    """Of the graph and the layout: those of the first property that does not hold."""
    facts, layout = program.facts, program.layout
    names = [record.name for record in program.stages["lowered"]]
    if names != [node.name for node in program.graph.nodes]:
        return ["its nodes have names that tintc does not give"]
    if not 1 <= facts.vocab_size < 2**31 or program.config.steps > _LARGEST_STEPS:
        return [f"it has a vocabulary of {facts.vocab_size} and {program.config.steps} steps"]
    tiles = sum(len(slot.tiles) for slot in layout.prefix.values())
    if layout.pages > tiles:
        return [f"its layout has {layout.pages} pages for {tiles} tiles"]
    context = Context(program.config, facts=facts, layout=layout)
    for name in LOWERED:
        if problems := check_property(name, program.graph, context):
            return problems
    returned = outputs(program.graph)
    return [
        *(
            f"{node.name} is returned as logits and has shape {info(node).shape}"
            for node in (returned["logits"], returned["initial_logits"])
            if info(node).shape not in [("B", n, facts.vocab_size) for n in ("T", "S")]
        ),
        *(f"there is no slot {name}" for name in returned["updates"] if name not in layout.prefix),
        *(f"slot {name} is called {s.name}" for name, s in layout.prefix.items() if s.name != name),
    ]


def weight_problems(program: Program, tensors: dict[str, Tensor], inner_lr: Tensor) -> Problems:
    """Weights that are missing, or of another shape or type than the graph and the slots say."""
    nodes = program.graph.find_nodes(op="placeholder")
    parameters = [(name, info(n).shape) for n in nodes if (name := info(n).parameter) is not None]
    slots = program.layout.prefix.values()
    named = {name for name, _ in parameters} | {slot.parameter for slot in slots}
    named |= set(program.aliases.values())
    if missing := sorted(named - set(tensors)):
        return [f"there is no weight {name}" for name in missing]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    types = {
        t.dtype for name, t in tensors.items() if t.is_floating_point() and not is_wide_table(name)
    }
    problems = [f"{n} has another shape" for n, shape in parameters if shape != shapes[n]]
    problems += [f"{n} holds no real numbers" for n in named if not tensors[n].is_floating_point()]
    problems += [
        f"{n} holds no root mean squares"
        for n in named
        if statistics_of(n) is not None and not is_root_mean_square(tensors[n])
    ]
    problems += [f"{s.name} is no part of its weight" for s in slots if not _is_part(s, shapes)]
    if len(types) > 1:
        problems.append(f"its weights are {', '.join(sorted(map(str, types)))}; expected one type")
    if inner_lr.shape != () or not math.isfinite(float(inner_lr)):
        problems.append("its inner learning rate is no number")
    return problems


def _is_part(slot: PrefixSlot, shapes: dict[str, tuple[int, ...]]) -> bool:
    whole = shapes[slot.parameter]
    whole = whole[1:] if len(whole) == 3 and whole[0] == 1 else whole
    rows, *rest = whole[::-1] if slot.transpose else whole
    height = (slot.rows.stop - slot.rows.start) * (rows // slot.rows.period)
    return rows % slot.rows.period == 0 and slot.shape == (height, *rest)
