"""The directory of an artifact: names, digests, and writes that are done whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tintc.ir.errors import ArtifactError, UsageError

FORMAT_VERSION = 4
MANIFEST, GRAPH, REPORT = "manifest.json", "graph.json", "report.json"
WEIGHTS, TOKENIZER = "weights.safetensors", "tokenizer"
INNER_LR = "tintc.inner_lr"  # among the weights
OWN_DIGEST = "manifest_sha256"


def check_target(path: Path, *, force: bool) -> None:
    """Raises UsageError if an artifact cannot be written to `path`."""
    path = path.expanduser()
    try:
        if path.exists() and not force:
            raise UsageError(
                f"{path} exists; pass force=True to replace it, or another output directory"
            )
        if path.exists() and (foreign := _foreign(path)):
            raise UsageError(
                f"{path} exists and {foreign}; tintc does not replace what it did not write"
            )
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}; expected a directory that can be written"
        ) from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        got = "cannot be written" if nearest.is_dir() else "is a file"
        raise UsageError(
            f"cannot write {path}: {nearest} {got}; expected a directory that can be written"
        )


def _foreign(path: Path) -> str | None:
    """What `path` holds that tintc did not write; None for an artifact or an empty directory."""
    if not path.is_dir():
        return "is a file"
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        strange = (
            sorted(found - {MANIFEST, *manifest["sha256"]})
            if "format_version" in manifest
            else sorted(found)
        )
    except (OSError, ValueError, TypeError, KeyError):
        return "is no tintc artifact" if found else None
    return f"holds {', '.join(strange[:3])}" if strange else None


def is_artifact(path: Path) -> bool:
    """Whether a directory looks like an artifact; whether it is one, `read_manifest` tells."""
    return os.path.isfile(path / MANIFEST) and not os.path.isfile(path / "config.json")


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest, after checking the format version, its own checksum and that of every file.
    Raises ArtifactError.
    """
    file = root / MANIFEST
    if not os.path.isfile(file):
        raise ArtifactError(
            f"{root} is no tintc artifact: it has no {MANIFEST} (tintc compile SOURCE -o DIR "
            "writes one)"
        )
    manifest = read_json(file)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{root} has format version {version}; this tintc reads version {FORMAT_VERSION}: "
            "compile the model again"
        )
    _check_digest(file, manifest_digest(manifest), manifest.get(OWN_DIGEST))
    expected = manifest.get("sha256")
    if not isinstance(expected, dict):
        raise ArtifactError(f"{file} lists no checksums; compile the model again")
    loaded = {
        GRAPH,
        WEIGHTS,
        REPORT,
        *(f.relative_to(root).as_posix() for f in (root / TOKENIZER).rglob("*") if f.is_file()),
    }
    for name in sorted(loaded | set(expected)):
        _check_digest(root / name, sha256(root / name), expected.get(name))
    return dict(manifest)


def _check_digest(file: Path, found: str, expected: object) -> None:
    if found != expected:
        raise ArtifactError(
            f"{file} is altered or truncated: its sha256 is {found}, the manifest says "
            f"{expected or 'nothing of it'}"
        )


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Of the manifest's content without this digest itself."""
    content = {name: value for name, value in manifest.items() if name != OWN_DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file's content. Raises ArtifactError if it cannot be read."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"{file} cannot be read: {error.strerror}; its sha256 cannot be checked"
        ) from error


def open_to_others(root: Path) -> None:
    """Gives files and folders the permissions of any new file: temporary ones are closed to other
    users.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in (root, *root.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def move_into_place(temporary: Path, path: Path) -> None:
    """Renames the finished directory; an artifact that is replaced is set aside first and comes
    back if that fails.
    """
    if not path.exists():
        temporary.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / "artifact"
    try:
        path.rename(aside)
        temporary.rename(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def write_json(file: Path, value: Any, indent: int | None = 1) -> None:
    file.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}; compile the model again") from error


def read_tokenizer(root: Path) -> Any:
    """The saved tokenizer, or None. Only transformers' own classes are loaded."""
    folder = root / TOKENIZER
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises what its readers raise
        raise ArtifactError(f"{folder} cannot be read as a tokenizer: {error}") from error
