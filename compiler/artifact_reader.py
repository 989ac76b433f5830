"""Reads the files of an artifact that may come from anybody.

Only plain files of known names inside the directory are opened, no larger than the manifest says;
their digests are compared, and JSON is checked against its schema before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from tintc.compiler.artifact_files import FORMAT_VERSION, MANIFEST, OWN_DIGEST
from tintc.compiler.artifact_schema import (
    GRAPH,
    GRAPH_SCHEMA,
    MANIFEST_SCHEMA,
    REPORT,
    TOKENIZER,
    WEIGHTS,
    Graph,
    Manifest,
    Seal,
)
from tintc.compiler.report_types import Report
from tintc.ir.errors import ArtifactError

LARGEST_JSON = 2**29  # bytes: hundreds of times what the largest models need
_MORE = 2**20  # bytes that a file may have more than the manifest says to be read at all
_AGAIN = "compile the model again"
_REPORT = TypeAdapter(Report)
T = TypeVar("T")
C = TypeVar("C", bytes, str)  # of a file or of a part of it


def read_manifest(root: Path) -> Manifest:
    """The manifest, after checking the format version, its own digest, and size and digest of every
    file.

    Raises ArtifactError.
    """
    file = root / MANIFEST
    if not root.is_dir() or not os.path.lexists(file):
        raise ArtifactError(
            f"{root} is no tintc artifact: it has no {MANIFEST} (tintc compile SOURCE -o DIR "
            "writes one)"
        )
    content = sealed(file, FORMAT_VERSION)
    manifest = checked(MANIFEST_SCHEMA.validate_json, content, file)
    missing = {GRAPH, REPORT, WEIGHTS} - set(manifest.files)
    if missing:
        raise ArtifactError(f"{file} lists no {', '.join(sorted(missing))}; {_AGAIN}")
    for name in _tokenizer_files(root) - set(manifest.files):
        compare(root / name, "one", None)
    for name, seal in sorted(manifest.files.items()):
        check_file(root, name, seal)
    return manifest


def sealed(file: Path, version: int, again: str = _AGAIN) -> bytes:
    """A JSON file that names its format version and its own digest, after checking both. Raises
    ArtifactError.
    """
    content = read_plain(file, LARGEST_JSON)
    values = parsed(content, file, again)
    found = values.get("format_version") if isinstance(values, dict) else None
    if found != version:
        raise ArtifactError(
            f"{file.parent} has format version {str(found)[:20]}; this tintc reads version "
            f"{version}: {again}"
        )
    compare(file, manifest_digest(values), values.get(OWN_DIGEST))
    return content


def read_graph(root: Path) -> Graph:
    """graph.json, whose digest `read_manifest` has checked. Raises ArtifactError."""
    return checked(GRAPH_SCHEMA.validate_json, read_plain(root / GRAPH, LARGEST_JSON), root / GRAPH)


def read_report(root: Path) -> Report:
    """report.json, likewise."""
    content = read_plain(root / REPORT, LARGEST_JSON)
    return checked(_REPORT.validate_json, content, root / REPORT)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Of the manifest's content without this digest itself."""
    content = {name: value for name, value in manifest.items() if name != OWN_DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal_of(file: Path) -> Seal:
    """Size and digest of a plain file. Raises ArtifactError if it is none or cannot be read."""
    size = _plain_size(file)
    try:
        with file.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"{file} cannot be read: {error.strerror}; its sha256 cannot be checked"
        ) from error
    return Seal(bytes=size, sha256=found)


def read_plain(file: Path, most: int) -> bytes:
    """The content of a plain file of at most so many bytes. Raises ArtifactError."""
    size = _plain_size(file)
    if size > most:
        raise ArtifactError(f"{file} has {size:,} bytes; expected at most {most:,}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}; {_AGAIN}") from error


def _plain_size(file: Path) -> int:
    """Nothing is opened that is no file: reading a device or a pipe may never end."""
    try:
        found = file.lstat()
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}; {_AGAIN}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no plain file"
        raise ArtifactError(f"{file} is {kind}; expected a file that tintc wrote")
    return found.st_size


def _tokenizer_files(root: Path) -> set[str]:
    """Names of what lies in the tokenizer's folder, which transformers would look at."""
    folder = root / TOKENIZER
    if folder.is_symlink():
        raise ArtifactError(f"{folder} is a link; expected a directory that tintc wrote")
    found = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return {Path(file).relative_to(root).as_posix() for file in found}


def check_file(root: Path, name: str, seal: Seal) -> None:
    """Raises ArtifactError unless a file of the directory is the one that was sealed."""
    file = root / name
    for folder in file.relative_to(root).parents:
        if (root / folder).is_symlink() and folder != Path("."):
            raise ArtifactError(f"{root / folder} is a link; expected a directory")
    size = _plain_size(file)
    if size > seal.bytes + _MORE:
        raise ArtifactError(
            f"{file} is altered or truncated: it has {size:,} bytes, the manifest says "
            f"{seal.bytes:,}"
        )
    compare(file, seal_of(file).sha256, seal.sha256)


def compare(file: Path, found: str, expected: object) -> None:
    """Raises ArtifactError unless a digest is the one that the manifest says."""
    if found != expected:
        raise ArtifactError(
            f"{file} is altered or truncated: its sha256 is {found}, the manifest says "
            f"{str(expected or 'nothing of it')[:100]}"
        )


def parsed(content: bytes, file: Path, again: str = _AGAIN) -> Any:
    """The values of a JSON file. again: what to do about a damaged one. Raises ArtifactError."""
    try:
        return from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ArtifactError(f"{file} cannot be read: {error}; {again}") from error


def checked(validate: Callable[[C], T], content: C, file: Path, again: str = _AGAIN) -> T:
    """What a schema makes of a JSON file. Raises ArtifactError for one that it does not fit."""
    try:
        return validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise ArtifactError(
            f"{file} is malformed at {place}: {first['msg'][:200]}; {again}"
        ) from None
