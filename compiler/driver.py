"""The pipeline, top to bottom: a model's name -> a running simulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tintc.compiler.capture import Captured, capture
from tintc.compiler.config import SimulatorConfig
from tintc.compiler.pass_manager import Context, ModelFacts, run_passes
from tintc.compiler.program import Program
from tintc.compiler.records import to_records
from tintc.compiler.sources import Source, load_source
from tintc.compiler.verification import check_first_forward
from tintc.passes import DEFAULT_PIPELINE
from tintc.runtime.simulator import Simulator

Progress = Callable[[str], None]
_CANONICAL_AFTER = "refuse_unsupported"


def compile(
    source: str | nn.Module,
    config: SimulatorConfig | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Simulator:
    """Compiles an auxiliary model into a simulator that runs its inner fine-tuning in one forward pass.

    source: a hub id, a directory written by save_pretrained, `tiny-opt`, `shape:NAME`, or an nn.Module.
    config: what to compute; default SimulatorConfig.paper(). dtype: of the weights; default float32, or the module's own.
    Other arguments say how to find the model. progress is called with the name of each stage.

    Raises SourceError, UnsupportedModelError, UsageError, MemoryLimitError, or NumericalError if the compiled first
    forward pass does not give the model's own logits.
    """
    config = config or SimulatorConfig.paper()
    say = progress or (lambda stage: None)
    say("load")
    loaded = load_source(
        source, revision=revision, cache_dir=cache_dir, offline=offline, trust_remote_code=trust_remote_code, seed=seed, dtype=dtype
    )
    say("capture")
    captured = capture(loaded.model)
    say("lower")
    program = lower(captured, config)
    # A module stays its owner's: training the simulator from outside must not change it.
    tensors = {name: t.clone() for name, t in captured.tensors.items()} if isinstance(source, nn.Module) else captured.tensors
    simulator = _simulator(program, tensors, loaded)
    say("check")
    check_first_forward(simulator, loaded.model)
    return simulator


def lower(captured: Captured, config: SimulatorConfig) -> Program:
    """Runs the passes over a captured graph and keeps printable records of the stages."""
    stages = {"captured": to_records(captured.graph)}

    def keep(name: str, graph: fx.Graph) -> None:
        if name == _CANONICAL_AFTER:
            stages["canonical"] = to_records(graph)

    facts = ModelFacts(max_positions=captured.max_tokens)
    context = Context(config, captured.tensors, captured.constants, facts)
    graph = run_passes(captured.graph, context, DEFAULT_PIPELINE, on_pass=keep)
    stages["lowered"] = to_records(graph)
    assert context.layout is not None
    return Program(graph, config, context.facts, context.layout, captured.aliases, stages)


def _simulator(program: Program, tensors: dict[str, Tensor], loaded: Source) -> Simulator:
    description: dict[str, Any] = dataclasses.asdict(loaded.description)
    return Simulator(program, tensors, source=description, tokenizer=loaded.tokenizer)
