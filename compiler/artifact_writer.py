"""Writes the artifact that `artifact.py` describes and reads. Apart from it, since saving a
tokenizer loads transformers and loading a simulator without one does not.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from tintc.compiler.artifact_files import (
    FORMAT_VERSION,
    INNER_LR,
    MANIFEST,
    OWN_DIGEST,
    check_target,
    replacing,
    write_json,
)
from tintc.compiler.artifact_reader import manifest_digest, seal_of
from tintc.compiler.artifact_schema import GRAPH, REPORT, TOKENIZER, WEIGHTS
from tintc.compiler.artifact_weights import write_weights
from tintc.compiler.reports.summary import report
from tintc.compiler.tokenizer_files import write_tokenizer
from tintc.runtime.simulator import Simulator
from tintc.version import __version__

_LIBRARIES = ("torch", "transformers", "safetensors")


def save(simulator: Simulator, path: str | Path, *, force: bool = False) -> Path:
    """Writes the artifact. Raises UsageError if `path` exists and not `force`, ArtifactError if it
    cannot be written; in both cases what was there stays as it was."""
    path = Path(path).expanduser()
    check_target(path, force=force)
    simulator.check_has_numbers()
    with replacing(path) as written:
        _write(simulator, written)
    return path


def _write(simulator: Simulator, root: Path) -> None:
    program = simulator.program
    write_json(
        root / GRAPH,
        {name: [r.to_dict() for r in records] for name, records in program.stages.items()},
        indent=None,
    )
    weights = {**simulator.prefix.tensors(), INNER_LR: simulator.inner_lr.detach()}
    seals = {WEIGHTS: write_weights(weights, root / WEIGHTS)}
    write_json(root / REPORT, report(simulator))
    write_tokenizer(simulator.tokenizer, root / TOKENIZER)
    for file in root.rglob("*"):
        if file.is_file() and file != root / WEIGHTS:
            seals[file.relative_to(root).as_posix()] = seal_of(file)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "config": program.config.to_dict(),
        "backend": simulator.backend,
        "share": simulator.share,
        "source": simulator.source,
        "facts": dataclasses.asdict(program.facts),
        "aliases": program.aliases,
        "layout": program.layout.to_dict(),
        **({"statistics": simulator.statistics} if simulator.statistics else {}),
        "versions": {
            "tintc": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        "files": {name: seal.model_dump() for name, seal in sorted(seals.items())},
    }
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as it will be read
    write_json(root / MANIFEST, {**manifest, OWN_DIGEST: manifest_digest(manifest)})
