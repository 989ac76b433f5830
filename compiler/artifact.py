"""The artifact: one directory that holds a compiled simulator.

    manifest.json        format version, config, source, facts, layout, library versions, and
                         checksums of all files
    graph.json           the stages of the graph; `lowered` is what runs, its operators are all of
                         the tint dialect
    weights.safetensors  the auxiliary weights by their own names, the inner learning rate, and what
                         the optimizer `rms` divides by; mapped (`artifact_weights.py`)
    report.json          what `tintc compile` prints
    tokenizer files      as transformers saves them, where the source had any that needs no code

Loading runs no code from it, unpickles nothing and checks every checksum. Writing is atomic: a
temporary directory beside the target (`compiler/beside.py`), then a rename.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from tintc.compiler.artifact_files import INNER_LR
from tintc.compiler.artifact_problems import graph_problems, weight_problems
from tintc.compiler.artifact_reader import read_graph, read_manifest
from tintc.compiler.artifact_schema import TOKENIZER, WEIGHTS, Manifest
from tintc.compiler.artifact_tokenizer import load_tokenizer
from tintc.compiler.artifact_weights import read_weights
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError
from tintc.ir.program import Program
from tintc.ir.records import from_records
from tintc.runtime.backends.transformer.structure import check_backend
from tintc.runtime.simulator import Simulator


@contextlib.contextmanager
def malformed(root: Path) -> Iterator[None]:
    """Turns what a manifest or graph of another form raises into an ArtifactError."""
    try:
        yield
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        StopIteration,
        RuntimeError,  # torch's, of sizes and names that it refuses; RecursionError
    ) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"{root} is malformed ({type(error).__name__}: {error}); compile the model again"
        ) from error


def _program(root: Path, manifest: Manifest) -> Program:
    stages = read_graph(root).records()
    return Program(
        graph=from_records([vars(record) for record in stages["lowered"]]),
        config=SimulatorConfig.from_dict(manifest.config),
        facts=manifest.facts,
        layout=manifest.layout,
        aliases=dict(manifest.aliases),
        stages=stages,
    )


def read_program(path: str | Path) -> Program:
    """The program of an artifact; its weights are not read. Raises ArtifactError as `load` does."""
    root = Path(path).expanduser()
    manifest = read_manifest(root)
    with malformed(root):
        program = _program(root, manifest)
        _refuse(root, graph_problems(program))
    return program


@torch.inference_mode(False)  # whatever the caller is in: what is made outlives it
def load(
    path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Simulator:
    """Reads an artifact back. device, dtype: of the weights; default cpu and as stored.

    As stored on the cpu, weights are the file's own pages, mapped privately: they take no memory
    beside it, and what is written to them stays in this process. Leave the file alone meanwhile;
    that it is replaced, renamed or removed does no harm.

    Raises ArtifactError if the directory is no artifact, of another format version, truncated or
    altered.
    """
    root = Path(path).expanduser()
    manifest = read_manifest(root)
    tensors = read_weights(root / WEIGHTS, device or "cpu", dtype)
    inner_lr = tensors.pop(INNER_LR)
    with malformed(root):
        program = _program(root, manifest)
        check_backend(manifest.backend, manifest.share)
        _refuse(root, graph_problems(program) or weight_problems(program, tensors, inner_lr))
        gathered = manifest.statistics
        simulator = Simulator(
            program,
            tensors,
            backend=manifest.backend,
            share=manifest.share,
            source=manifest.source.model_dump(),
            tokenizer=load_tokenizer(root / TOKENIZER),
            statistics=None if gathered is None else gathered.model_dump(),
        )
    simulator.inner_lr.data.fill_(float(inner_lr))
    return simulator


def _refuse(root: Path, problems: list[str]) -> None:
    if problems:
        raise ArtifactError(
            f"{root} is malformed: {'; '.join(problems[:3])[:500]}; compile the model again"
        )
