"""The exact counterpart of a program: direct fine-tuning of the same layers."""

from __future__ import annotations

import dataclasses

from tintc.ir.context import Context
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.pass_manager import run_passes
from tintc.ir.program import Program
from tintc.ir.records import from_records
from tintc.passes import DEFAULT_PIPELINE
from tintc.passes.train.select_trainable import select_trainable

_AFTER_CANONICAL = DEFAULT_PIPELINE[DEFAULT_PIPELINE.index(select_trainable) :]


def exact_program(program: Program, steps: int | None = None) -> Program | None:
    """The same model and layers with exact gradients, lowered once more from the canonical graph
    that every program keeps. steps: default the program's own.

    None where only the approximations of the program's config can be simulated.
    """
    config = program.config.exact_counterpart()
    config = dataclasses.replace(config, steps=steps or config.steps)
    context = Context(config, facts=program.facts)
    graph = from_records([record.to_dict() for record in program.stages["canonical"]])
    try:
        run_passes(graph, context, _AFTER_CANONICAL)
    except UnsupportedModelError:
        return None
    assert context.layout is not None
    return dataclasses.replace(
        program, graph=graph, config=config, facts=context.facts, layout=context.layout, stages={}
    )
