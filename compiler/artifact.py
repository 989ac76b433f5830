"""The artifact: one directory that holds a compiled simulator.

    manifest.json        format version, config, source, facts, layout, library versions, checksums of the other files
    graph.json           the stages of the graph; `lowered` is what runs, its operators are all of the tint dialect
    weights.safetensors  the auxiliary weights by their own names, and the inner learning rate
    report.json          what `tintc compile` prints
    tokenizer files      as transformers saves them, where the source had any

Loading runs no code from it, unpickles nothing and checks every checksum. Writing is atomic: a temporary
directory beside the target, then a rename.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import tintc
from tintc.compiler.config import SimulatorConfig
from tintc.compiler.errors import ArtifactError, UsageError
from tintc.compiler.layout import Layout
from tintc.compiler.pass_manager import ModelFacts
from tintc.compiler.program import Program
from tintc.compiler.records import NodeRecord, from_records

if TYPE_CHECKING:
    from tintc.runtime.simulator import Simulator

FORMAT_VERSION = 1
INNER_LR = "tintc.inner_lr"
_MANIFEST, _GRAPH, _WEIGHTS, _REPORT = "manifest.json", "graph.json", "weights.safetensors", "report.json"
_TOKENIZER = "tokenizer"
_LIBRARIES = ("torch", "transformers", "safetensors")


def save(simulator: Simulator, path: Path, *, force: bool = False) -> Path:
    """Writes the artifact. Raises UsageError if `path` exists and not `force`, ArtifactError if it cannot be written;
    in both cases what was there stays as it was."""
    path = path.expanduser()
    check_target(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        _write(simulator, temporary)
        temporary.chmod(0o755)
        _move_into_place(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArtifactError(f"cannot write {path}: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def check_target(path: Path, *, force: bool) -> None:
    """Raises UsageError if an artifact cannot be written to `path`."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; pass --force to replace it, or another output directory")
    if path.exists() and not (path / _MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists and is no tintc artifact; tintc does not replace what it did not write")


def load(path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Simulator:
    """Reads an artifact back. device, dtype: of the weights; default cpu and as stored.

    Raises ArtifactError if the directory is no artifact, of another format version, truncated or altered.
    """
    from tintc.runtime.simulator import Simulator

    root = Path(path).expanduser()
    manifest = read_manifest(root)
    graph = _read_json(root / _GRAPH)
    try:
        stages = {name: [NodeRecord(**record) for record in records] for name, records in graph.items()}
        program = Program(
            graph=from_records(graph["lowered"]),
            config=SimulatorConfig.from_dict(manifest["config"]),
            facts=ModelFacts(**manifest["facts"]),
            layout=Layout.from_dict(manifest["layout"]),
            aliases=dict(manifest["aliases"]),
            stages=stages,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{root}: malformed ({type(error).__name__}: {error}); compile the model again") from error
    tensors = _read_weights(root / _WEIGHTS, device or "cpu", dtype)
    inner_lr = tensors.pop(INNER_LR)
    simulator = Simulator(program, tensors, source=manifest["source"], tokenizer=_tokenizer(root))
    simulator.inner_lr.data.fill_(float(inner_lr))
    return simulator


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest, after checking the format version and the checksum of every file. Raises ArtifactError."""
    if not (root / _MANIFEST).is_file():
        raise ArtifactError(f"{root} is no tintc artifact: it has no {_MANIFEST} (tintc compile SOURCE -o DIR writes one)")
    manifest = _read_json(root / _MANIFEST)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{root} has format version {version}; this tintc reads version {FORMAT_VERSION}: compile the model again")
    for name, expected in manifest.get("sha256", {}).items():
        file = root / name
        found = sha256(file) if file.is_file() else "no such file"
        if found != expected:
            raise ArtifactError(f"{file} is altered or truncated: its sha256 is {found}, the manifest says {expected}")
    return dict(manifest)


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(simulator: Simulator, root: Path) -> None:
    from tintc.compiler.report import report

    program = simulator.program
    _write_json(root / _GRAPH, {name: [r.to_dict() for r in records] for name, records in program.stages.items()}, indent=None)
    tensors = {name: tensor.detach().contiguous() for name, tensor in simulator.prefix.tensors().items()}
    save_file({**tensors, INNER_LR: simulator.inner_lr.detach().clone()}, root / _WEIGHTS)
    _write_json(root / _REPORT, report(simulator))
    if simulator.tokenizer is not None:
        simulator.tokenizer.save_pretrained(str(root / _TOKENIZER))
    manifest = {
        "format_version": FORMAT_VERSION,
        "config": program.config.to_dict(),
        "source": simulator.source,
        "facts": dataclasses.asdict(program.facts),
        "aliases": program.aliases,
        "layout": program.layout.to_dict(),
        "versions": {
            "tintc": tintc.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        "sha256": {str(f.relative_to(root).as_posix()): sha256(f) for f in sorted(root.rglob("*")) if f.is_file()},
    }
    _write_json(root / _MANIFEST, manifest)


def _move_into_place(temporary: Path, path: Path) -> None:
    """Renames the finished directory; an artifact that is replaced is set aside first and comes back if that fails."""
    if not path.exists():
        temporary.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / "artifact"
    path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        aside.rename(path)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def _write_json(file: Path, value: Any, indent: int | None = 1) -> None:
    file.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}; compile the model again") from error


def _read_weights(file: Path, device: str | torch.device, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    if INNER_LR not in tensors:
        raise ArtifactError(f"{file} holds no {INNER_LR}; compile the model again")
    cast = {name: t.to(dtype) if dtype and t.is_floating_point() and name != INNER_LR else t for name, t in tensors.items()}
    return cast


def _tokenizer(root: Path) -> Any:
    """The saved tokenizer, or None. Only transformers' own classes are loaded."""
    folder = root / _TOKENIZER
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what its readers raise
        raise ArtifactError(f"{folder} cannot be read as a tokenizer: {error}") from error
