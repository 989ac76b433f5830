"""FLOPs of fine-tuning the auxiliary model directly: what a simulator's own are compared with."""

from __future__ import annotations

import dataclasses

import torch

from tintc.compiler.cost import estimate
from tintc.ir.call_sizes import CallSizes
from tintc.ir.context import Context
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.pass_manager import run_passes
from tintc.ir.program import Program
from tintc.ir.records import from_records
from tintc.passes import DEFAULT_PIPELINE
from tintc.passes.train.select_trainable import select_trainable

_AFTER_CANONICAL = DEFAULT_PIPELINE[DEFAULT_PIPELINE.index(select_trainable) :]


def direct_flops(program: Program, sizes: CallSizes) -> int:
    """FLOPs of one call that fine-tunes by exact gradients, as torch.autograd would: the same
    tokens, steps and layers, without optimizations, and a prediction with the result.

    A multiplication and an addition count as two, matrix products only. The canonical graph, which
    every program keeps, is lowered once more for it. 0 where only the approximations of the
    program's config can be simulated.
    """
    config = program.config.exact_counterpart()
    context = Context(config, facts=program.facts)
    graph = from_records([record.to_dict() for record in program.stages["canonical"]])
    try:
        run_passes(graph, context, _AFTER_CANONICAL)
    except UnsupportedModelError:
        return 0
    assert context.layout is not None
    exact = dataclasses.replace(
        program, graph=graph, config=config, facts=context.facts, layout=context.layout, stages={}
    )
    # In float32 whatever the program's type is: the number of products does not depend on it.
    return estimate(exact, "fused", torch.float32, **sizes, optimize=False).flops
