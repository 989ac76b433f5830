"""The directory of an artifact: where it may go, and writes that are done whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tintc.compiler import beside
from tintc.ir.errors import ArtifactError, UsageError

FORMAT_VERSION = 6
MANIFEST = "manifest.json"
INNER_LR = "tintc.inner_lr"  # among the weights
OWN_DIGEST = "manifest_sha256"


def check_target(
    path: Path, *, force: bool, manifest: str = MANIFEST, kind: str = "tintc artifact"
) -> None:
    """Raises UsageError if an artifact cannot be written to `path`, after removing what killed
    processes left beside it. manifest, kind: of a directory that may be replaced.
    """
    path = path.expanduser()
    beside.clear(path.resolve())
    try:
        if path.exists() and not force:
            raise UsageError(
                f"{path} exists; pass force=True to replace it, or another output directory"
            )
        if path.exists() and (foreign := _foreign(path, manifest, kind)):
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


def _foreign(path: Path, name: str, kind: str) -> str | None:
    """What `path` holds that tintc did not write; None for an artifact or an empty directory."""
    if not path.is_dir():
        return "is a file"
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    try:
        manifest = json.loads((path / name).read_text(encoding="utf-8"))
        strange = (
            sorted(found - {name, *manifest["files"]})
            if "format_version" in manifest
            else sorted(found)
        )
    except (OSError, ValueError, TypeError, KeyError):
        return f"is no {kind}" if found else None
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new directory beside `path` to write into, which takes its place when the block is done.

    Raises ArtifactError if it cannot be written; what was there stays as it was then.
    """
    from safetensors import SafetensorError  # `tintc --help` needs this module, but not that one

    target = path.expanduser().resolve()  # `.` has no parent to write beside
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside.temporary(target) as written:
            yield written
            open_to_others(written)
            move_into_place(written, target)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArtifactError(f"cannot write {path}: {reason}; nothing was left behind") from error
    finally:
        if not target.exists():
            for parent in new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()


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
