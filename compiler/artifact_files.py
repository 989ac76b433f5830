"""The directory of an artifact: where it may go, and writes that are done whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tintc.compiler import beside
from tintc.ir.errors import UsageError

FORMAT_VERSION = 6
MANIFEST = "manifest.json"
INNER_LR = "tintc.inner_lr"  # among the weights
OWN_DIGEST = "manifest_sha256"


def check_target(path: Path, *, force: bool) -> None:
    """Raises UsageError if an artifact cannot be written to `path`, after removing what killed
    processes left beside it.
    """
    path = path.expanduser()
    beside.clear(path.resolve())
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
            sorted(found - {MANIFEST, *manifest["files"]})
            if "format_version" in manifest
            else sorted(found)
        )
    except (OSError, ValueError, TypeError, KeyError):
        return "is no tintc artifact" if found else None
    return f"holds {', '.join(strange[:3])}" if strange else None


def is_artifact(path: Path) -> bool:
    """Whether a directory looks like an artifact; whether it is one, `read_manifest` tells."""
    return os.path.isfile(path / MANIFEST) and not os.path.isfile(path / "config.json")


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
    with beside.set_aside(path):
        temporary.rename(path)


def write_json(file: Path, value: Any, indent: int | None = 1) -> None:
    file.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
