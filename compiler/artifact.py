"""The artifact: one directory that holds a compiled simulator.

    manifest.json        format version, config, source, facts, layout, library versions, and
                         checksums of all files
    graph.json           the stages of the graph; `lowered` is what runs, its operators are all of
                         the tint dialect
    weights.safetensors  the auxiliary weights by their own names, and the inner learning rate
    report.json          what `tintc compile` prints
    tokenizer files      as transformers saves them, where the source had any

Loading runs no code from it, unpickles nothing and checks every checksum. Writing is atomic: a
temporary directory beside the target, then a rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tintc.compiler.artifact_files import (
    FORMAT_VERSION,
    GRAPH,
    INNER_LR,
    MANIFEST,
    OWN_DIGEST,
    REPORT,
    TOKENIZER,
    WEIGHTS,
    check_target,
    manifest_digest,
    move_into_place,
    open_to_others,
    read_json,
    read_manifest,
    read_tokenizer,
    sha256,
    write_json,
)
from tintc.compiler.reports.summary import report
from tintc.ir.builder import outputs
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.contracts import check_property
from tintc.ir.errors import ArtifactError
from tintc.ir.facts import ModelFacts
from tintc.ir.inputs import is_wide_table
from tintc.ir.layout import Layout
from tintc.ir.node_meta import info
from tintc.ir.precision import HALF
from tintc.ir.program import Program
from tintc.ir.records import NodeRecord, from_records
from tintc.runtime.backends.transformer.structure import check_backend
from tintc.runtime.simulator import Simulator
from tintc.version import __version__

_ORIGIN = ("is_local", "local_files_only", "name_or_path")
_PROPERTIES = (
    "well_formed",
    "tint_only",
    "shapes_agree",
    "named_outputs",
    "prefix_slots_disjoint",
    "memory_slots_disjoint",
)
_LIBRARIES = ("torch", "transformers", "safetensors")


def save(simulator: Simulator, path: str | Path, *, force: bool = False) -> Path:
    """Writes the artifact. Raises UsageError if `path` exists and not `force`, ArtifactError if it
    cannot be written; in both cases what was there stays as it was."""
    path = Path(path).expanduser()
    check_target(path, force=force)
    target = path.resolve()  # `.` has no parent to write beside
    new_parents = [parent for parent in target.parents if not parent.exists()]
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        _write(simulator, temporary)
        open_to_others(temporary)
        move_into_place(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArtifactError(f"cannot write {path}: {reason}; nothing was left behind") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not target.exists():
            for parent in new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()
    return path


@contextlib.contextmanager
def _malformed(root: Path) -> Iterator[None]:
    """Turns what a manifest or graph of another form raises into an ArtifactError."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        StopIteration,
    ) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"{root} is malformed ({type(error).__name__}: {error}); compile the model again"
        ) from error


def _program(root: Path, manifest: dict[str, Any]) -> Program:
    graph = read_json(root / GRAPH)
    return Program(
        graph=from_records(graph["lowered"]),
        config=SimulatorConfig.from_dict(manifest["config"]),
        facts=ModelFacts(**manifest["facts"]),
        layout=Layout.from_dict(manifest["layout"]),
        aliases=dict(manifest["aliases"]),
        stages={
            name: [NodeRecord(**record) for record in records] for name, records in graph.items()
        },
    )


def read_program(path: str | Path) -> Program:
    """The program of an artifact; its weights are not read. Raises ArtifactError as `load` does."""
    root = Path(path).expanduser()
    with _malformed(root):
        return _program(root, read_manifest(root))


def load(
    path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Simulator:
    """Reads an artifact back. device, dtype: of the weights; default cpu and as stored.

    Raises ArtifactError if the directory is no artifact, of another format version, truncated or
    altered.
    """
    root = Path(path).expanduser()
    manifest = read_manifest(root)
    tensors = _read_weights(root / WEIGHTS, device or "cpu", dtype)
    inner_lr = tensors.pop(INNER_LR)
    with _malformed(root):
        program = _program(root, manifest)
        source = dict(manifest["source"])
        backend, share = str(manifest["backend"]), str(manifest["share"])
        check_backend(backend, share)
        problems = _problems(program, tensors)
    if problems:
        raise ArtifactError(
            f"{root} is malformed: {'; '.join(problems[:3])}; compile the model again"
        )
    simulator = Simulator(
        program,
        tensors,
        backend=backend,
        share=share,
        source=source,
        tokenizer=read_tokenizer(root),
    )
    simulator.inner_lr.data.fill_(float(inner_lr))
    return simulator


def _problems(program: Program, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Why the graph is not a lowered one, or where graph, layout and weights do not fit each
    other.
    """
    names = [record.name for record in program.stages["lowered"]]
    context = Context(program.config, facts=program.facts, layout=program.layout)
    problems = [] if isinstance(program.facts.block_path, str) else ["its block_path is no text"]
    problems += (
        []
        if names == [node.name for node in program.graph.nodes]
        else ["its nodes have names that tintc does not give"]
    )
    problems += [
        problem for name in _PROPERTIES for problem in check_property(name, program.graph, context)
    ]
    nodes = program.graph.find_nodes(op="placeholder")
    parameters = [(name, node) for node in nodes if (name := info(node).parameter) is not None]
    named = {
        *(name for name, _ in parameters),
        *(slot.parameter for slot in program.layout.prefix.values()),
        *program.aliases.values(),
    }
    problems += [
        f"there is no weight {name}" for name in sorted(map(str, named)) if name not in tensors
    ]
    if not problems:
        slots = program.layout.prefix
        problems += [
            f"there is no slot {name}"
            for name in outputs(program.graph)["updates"]
            if name not in slots
        ]
        problems += [
            f"{name} has another shape"
            for name, node in parameters
            if info(node).shape != tuple(tensors[name].shape)
        ]
    return problems


def _write(simulator: Simulator, root: Path) -> None:
    program = simulator.program
    write_json(
        root / GRAPH,
        {name: [r.to_dict() for r in records] for name, records in program.stages.items()},
        indent=None,
    )
    tensors = {
        name: tensor.detach().contiguous() for name, tensor in simulator.prefix.tensors().items()
    }
    save_file({**tensors, INNER_LR: simulator.inner_lr.detach().clone()}, root / WEIGHTS)
    write_json(root / REPORT, report(simulator))
    if simulator.tokenizer is not None:
        try:
            simulator.tokenizer.save_pretrained(str(root / TOKENIZER))
            _forget_origin(root / TOKENIZER / "tokenizer_config.json")
        except (
            Exception
        ) as error:  # the tokenizers library raises a bare Exception when the disk is full
            raise OSError(f"the tokenizer cannot be saved: {error}") from error
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "config": program.config.to_dict(),
        "backend": simulator.backend,
        "share": simulator.share,
        "source": simulator.source,
        "facts": dataclasses.asdict(program.facts),
        "aliases": program.aliases,
        "layout": program.layout.to_dict(),
        "versions": {
            "tintc": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        "sha256": {
            str(f.relative_to(root).as_posix()): sha256(f)
            for f in sorted(root.rglob("*"))
            if f.is_file()
        },
    }
    write_json(root / MANIFEST, {**manifest, OWN_DIGEST: manifest_digest(manifest)})


def _forget_origin(file: Path) -> None:
    """Drops what transformers notes about where a tokenizer was loaded from: two compilations give
    the same file.
    """
    if file.is_file():
        kept = {
            name: value
            for name, value in json.loads(file.read_text(encoding="utf-8")).items()
            if name not in _ORIGIN
        }
        write_json(file, kept, indent=2)


def _read_weights(
    file: Path, device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as handle:
            # Copied out of the file: what is mapped there is not aligned, and other kernels round
            # differently.
            tensors = {name: _cast(name, handle.get_tensor(name), dtype) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    if INNER_LR not in tensors:
        raise ArtifactError(f"{file} holds no {INNER_LR}; compile the model again")
    return tensors


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    changes = dtype is not None and tensor.is_floating_point() and name != INNER_LR
    wanted = torch.float32 if is_wide_table(name) and dtype in HALF else dtype
    return tensor.to(wanted if changes else tensor.dtype, copy=True)
