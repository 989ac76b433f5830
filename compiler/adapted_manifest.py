"""What a directory of something adapted says of itself: `tintc_adapted.json`, in every format.

It names the format, what was adapted with what, and size and digest of all files beside it. A
directory is replaced only if it has one.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from tintc.compiler.artifact_files import OWN_DIGEST, write_json
from tintc.compiler.artifact_reader import (
    check_file,
    checked,
    manifest_digest,
    seal_of,
    sealed,
)
from tintc.compiler.artifact_schema import (
    Count,
    Digest,
    Factors,
    Origin,
    Positive,
    Seal,
    Several,
    Text,
)
from tintc.ir.errors import ArtifactError, UsageError
from tintc.ir.inputs import is_models_own
from tintc.runtime.adapted import Adapted
from tintc.runtime.digest import digest_of
from tintc.runtime.simulator import Simulator
from tintc.version import __version__

ADAPTED = "tintc_adapted.json"
AGAIN = "save it again"
KIND = "directory that tintc.save_adapted wrote"
UPDATES = "updates.safetensors"
Format = Literal["tintc", "hf", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)
_VERSION = 1
_READERS = {
    "hf": "transformers.AutoModelForCausalLM.from_pretrained loads it",
    "peft": "peft.PeftModel.from_pretrained loads it",
}
_LIBRARIES = ("torch", "transformers", "safetensors")


class AdaptedManifest(BaseModel):
    """weights: digest of the simulator's. index: which of the contexts is each sequence's.
    factored, positions: as in `Updates`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    format_version: Count
    format: Format
    source: Origin
    config: dict[Text, bool | Count | float | Text | Several | Factors | None]
    inner_lr: float
    weights: Digest
    contexts: Positive
    index: Annotated[list[Count], Field(min_length=1)]
    factored: list[Text]
    positions: Count | None
    versions: dict[Text, Text]
    files: Annotated[dict[Text, Seal], Field(max_length=10_000)]
    manifest_sha256: Digest


def simulator_of(adapted: object) -> Simulator:
    """Whose it is. Raises UsageError for what `Simulator.adapt` did not make, and on the meta
    device.
    """
    simulator = adapted.simulator if isinstance(adapted, Adapted) else None
    if not isinstance(simulator, Simulator):
        raise UsageError(
            f"got a {type(adapted).__name__}; expected what simulator.adapt(...) returned"
        )
    simulator.check_has_numbers()
    return simulator


def write_manifest(root: Path, adapted: Adapted, kind: Format) -> None:
    """For the files that are there by now."""
    simulator, updates = simulator_of(adapted), adapted.updates
    values: dict[str, Any] = {
        "format_version": _VERSION,
        "format": kind,
        "source": simulator.source,
        "config": simulator.config.described(),
        "inner_lr": float(simulator.inner_lr.detach()),
        "weights": digest_of_simulator(simulator),
        "contexts": updates.contexts,
        "index": list(adapted.index),
        "factored": sorted(updates.factored),
        "positions": updates.positions,
        "versions": {
            "tintc": __version__,
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        "files": {
            file.relative_to(root).as_posix(): seal_of(file).model_dump()
            for file in sorted(root.rglob("*"))
            if file.is_file()
        },
    }
    values = json.loads(json.dumps(values, allow_nan=False))  # as it will be read
    write_json(root / ADAPTED, {**values, OWN_DIGEST: manifest_digest(values)})


def read_manifest(root: Path, wanted: Format) -> AdaptedManifest:
    """After comparing the digests of itself and of every file.

    Raises ArtifactError for what is no such directory, of another version, truncated or altered,
    UsageError for another format.
    """
    file = root / ADAPTED
    if not file.exists():
        raise ArtifactError(
            f"{root} holds nothing adapted: it has no {ADAPTED} (tintc.save_adapted writes one)"
        )
    content = sealed(file, _VERSION, AGAIN)
    manifest = checked(AdaptedManifest.model_validate_json, content, file, AGAIN)
    if manifest.format != wanted:
        raise UsageError(
            f"{root} has the format {manifest.format}; expected {wanted}: "
            f"{_READERS[manifest.format]}"
        )
    for name, seal in sorted(manifest.files.items()):
        check_file(root, name, seal)
    return manifest


def check_simulator(root: Path, manifest: AdaptedManifest, simulator: Simulator) -> None:
    """Raises UsageError for another simulator than the one that was adapted."""
    found, wanted = json.loads(json.dumps(simulator.config.described())), manifest.config
    other = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if other:
        name = other[0]
        raise UsageError(
            f"{root} was adapted with {name} {wanted.get(name)}, and this simulator has "
            f"{found.get(name)}; load it with the simulator that was adapted"
        )
    if digest_of_simulator(simulator) != manifest.weights:
        raise UsageError(
            f"{root} belongs to another model, to other weights or another dtype of it; load it "
            "with the simulator that was adapted"
        )


def digest_of_simulator(simulator: Simulator) -> str:
    """Of the auxiliary weights: what was adapted stands beside them."""
    tensors = simulator.prefix.tensors()
    return digest_of({name: value for name, value in tensors.items() if is_models_own(name)})
