"""The pipeline, top to bottom: a model's name -> a running simulator."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from tintc.compiler.checks import check as check_program
from tintc.compiler.frontend.capture import Captured, capture, untouched
from tintc.compiler.frontend.model_checks import check_prefix_memory
from tintc.compiler.frontend.rope import rope_of_each_call
from tintc.compiler.frontend.sources import load_source
from tintc.compiler.gradient_statistics import Statistics, chosen_statistics
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.errors import TintcError
from tintc.ir.facts import ModelFacts
from tintc.ir.named import LOAD, Check, Islands
from tintc.ir.pass_manager import run_passes
from tintc.ir.program import Program
from tintc.ir.records import to_records
from tintc.passes.lowering import CANONICAL_AFTER, DEFAULT_PIPELINE
from tintc.runtime.backends.transformer.structure import check_backend
from tintc.runtime.calibration import Wanted
from tintc.runtime.simulator import Simulator

Progress = Callable[[str], None]
_log = logging.getLogger(__name__)


@torch.inference_mode(False)  # whatever the caller is in: what is made outlives it
def compile(
    source: str | nn.Module,
    config: SimulatorConfig | None = None,
    *,
    backend: str = "fused",
    share: str = "none",
    optimize: bool | Collection[str] = True,
    torch_compile: str | None = None,
    memory: str | int = "auto",
    calibration: Wanted = "auto",
    revision: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    islands: Islands = "allow",
    check: Check | None = None,
    statistics: str | Path | Statistics | None = None,
    progress: Progress | None = None,
) -> Simulator:
    """Compiles an auxiliary model into a simulator that runs its inner fine-tuning in one forward
    pass.

    source: a hub id, a directory written by save_pretrained, a .gguf file, `tiny-opt`,
    `smollm2-135m`, `shape:NAME`, or an nn.Module.
    config: what to compute; default SimulatorConfig.paper(). dtype: of the weights; default
    float32, or the module's own.
    backend: `fused` runs plain torch code; `transformer` is the paper's construction, with weights
    in prefix tokens and structural constants that can be counted (`tintc.parameter_report`).
    share: which of those constants one copy serves for, `none`, `layers` or `all`. Results are the
    same up to rounding, and the same to the bit however constants are shared.
    optimize: False, or names out of `tintc.OPTIMIZATION_NAMES`: which optimizations of the fused
    back end are on (default all).
    torch_compile: a mode of torch.compile for calls that nobody differentiates, `reduce-overhead`
    for CUDA graphs; by default plain torch runs, since compiling takes longer than most uses.
    memory: how many sequences run together, `auto`, `lowest`, or so many bytes of activations.
    calibration: what optimizations choose by, `auto`, `off`, or a file of `tintc env --calibrate`;
    see `Simulator`.
    islands: `allow` differentiates by torch what no pass recognises (docs/concepts/islands.md),
    `refuse` refuses it, `report` also says on the log what it is.
    check: `forward` compares initial logits with the model's, `step` also the updates of one exact
    step with those of torch.autograd, `none` nothing; by default a step for models of up to 40 M
    parameters, which takes less than 2 s.
    statistics: of the optimizer `rms`, which needs them: the root mean squares of gradients that
    `tintc statistics` or `tintc.gather_statistics` gathered on the same model with the same
    gradients; default those that a compiled simulator as a source has itself.
    Other arguments say how to find the model. progress is called with the name of each stage.

    Raises SourceError, UnsupportedModelError, UsageError, MemoryLimitError, or NumericalError if
    what was compiled does not compute what the model does.
    """
    config = config or SimulatorConfig.paper()
    check_backend(backend, share)
    gathered = chosen_statistics(source, statistics, config)
    say = progress or (lambda stage: None)
    say(LOAD)
    loaded = load_source(
        source,
        revision=revision,
        cache_dir=cache_dir,
        offline=offline,
        trust_remote_code=trust_remote_code,
        seed=seed,
        dtype=dtype,
        progress=say,
        examine=examiner(config, islands),
    )
    say("capture")
    captured = capture(loaded.model)
    say("lower")
    program = lower(captured, config, islands)
    if backend == "transformer":
        check_prefix_memory(
            program.layout.prefix_numbers,
            next(t.dtype for t in captured.tensors.values() if t.is_floating_point()),
        )
    # A module stays its owner's: training the simulator from outside must not change it.
    tensors = (
        {name: t.clone() for name, t in captured.tensors.items()}
        if isinstance(source, nn.Module)
        else captured.tensors
    )
    if gathered is not None:
        own = gathered.for_program(program, captured.tensors, loaded.description.sha256)
        tensors = {**tensors, **own}
    description: dict[str, Any] = dataclasses.asdict(loaded.description)
    simulator = Simulator(
        program,
        tensors,
        backend=backend,
        share=share,
        optimize=optimize,
        torch_compile=torch_compile,
        memory=memory,
        calibration=calibration,
        source=description,
        tokenizer=loaded.tokenizer,
        statistics=None if gathered is None else gathered.about.model_dump(),
    )
    say("check")
    with untouched(loaded.model), rope_of_each_call(loaded.model):
        check_program(simulator, loaded.model, check)
    return simulator


def examiner(config: SimulatorConfig, islands: Islands = "allow") -> Callable[[nn.Module], None]:
    """Captures and lowers a model whose weights are on the meta device, for what that raises: their
    numbers decide nothing of it.
    """

    def examine(model: nn.Module) -> None:
        try:
            lower(capture(model), config, islands)
        except TintcError:
            raise
        except Exception as error:  # is raised again, with weights, if it is no matter of these
            _log.debug("the model without weights: %s", error)

    return examine


def lower(captured: Captured, config: SimulatorConfig, islands: Islands = "allow") -> Program:
    """Runs the passes over a captured graph and keeps printable records of the stages."""
    stages = {"captured": to_records(captured.graph)}

    def keep(name: str, graph: fx.Graph) -> None:
        if name == CANONICAL_AFTER:
            stages["canonical"] = to_records(graph)

    facts = ModelFacts(max_tokens=captured.max_tokens, min_tokens=captured.min_tokens)
    context = Context(
        config,
        captured.tensors,
        captured.constants,
        facts,
        islands=islands,
        aliases=captured.aliases,
        vocabulary=captured.vocabulary,
    )
    graph = run_passes(captured.graph, context, DEFAULT_PIPELINE, on_pass=keep)
    stages["lowered"] = to_records(graph)
    assert context.layout is not None
    return Program(
        graph,
        config,
        context.facts,
        context.layout,
        captured.aliases,
        tables=context.tables,
        stages=stages,
    )
