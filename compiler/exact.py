"""A program lowered once more under another config; and its exact counterpart: direct fine-tuning
of the same layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.dialect import argument
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import Pass, run_passes
from tintc.ir.program import Program
from tintc.ir.records import from_records
from tintc.passes.lowering import DEFAULT_PIPELINE
from tintc.passes.train.select_trainable import select_trainable

_AFTER_CANONICAL = DEFAULT_PIPELINE[DEFAULT_PIPELINE.index(select_trainable) :]


def exact_program(program: Program, steps: int | None = None) -> Program | None:
    """The same model and layers with exact gradients, lowered once more from the canonical graph
    that every program keeps. steps: default the program's own.

    None where only the approximations of the program's config can be simulated.
    """
    config = program.config.exact_counterpart()
    config = dataclasses.replace(config, steps=steps or config.steps)
    try:
        return relowered(program, config)
    except UnsupportedModelError:
        return None


def relowered(program: Program, config: SimulatorConfig) -> Program:
    """The same model under another config, lowered once more from the canonical graph that every
    program keeps. Raises UnsupportedModelError where a pass refuses it.
    """
    graph, context = _passed(program, config, _AFTER_CANONICAL)
    assert context.layout is not None
    return dataclasses.replace(
        program, graph=graph, config=config, facts=context.facts, layout=context.layout, stages={}
    )


def learning_parameters(program: Program) -> set[str]:
    """Names of the auxiliary parameters that exact fine-tuning of the same layers trains; where it
    cannot be simulated, of those that the program itself does.
    """
    try:
        graph, _ = _passed(program, program.config.exact_counterpart(), (select_trainable,))
    except UnsupportedModelError:
        return {slot.parameter for slot in program.layout.prefix.values() if slot.trainable}
    return {
        parameter
        for node in graph.nodes
        if info(node).trainable
        and (parameter := info(argument(node, "parameter")).parameter) is not None
    }


def _passed(
    program: Program, config: SimulatorConfig, passes: Sequence[Pass]
) -> tuple[fx.Graph, Context]:
    """The canonical graph behind these passes. Raises UnsupportedModelError if one refuses it."""
    context = Context(config, facts=program.facts, aliases=program.aliases)
    graph = from_records([vars(record) for record in program.stages["canonical"]])
    return run_passes(graph, context, passes), context
