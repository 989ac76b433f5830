"""Files of a model: whether each is there, whole and what the hub has, how to get it anew, and
which ones others see.

In the hub's cache a file is a link to its content, `blobs/DIGEST`, and the digest is what the hub
gave: SHA-256 of a large file, git's hash of a small one. What was received is never compared with
it: a bit that flipped on the way, or on the disk later, would go unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import git_hash

from tintc.compiler.frontend.messages import first_line
from tintc.ir.errors import SourceError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}")
_BLOBS = "blobs"
_POINTER = b"version https://git-lfs.github.com/spec/"  # how git-lfs begins what stands for a file
_WRITTEN = "a directory written by save_pretrained"
ADAPTER = "adapter_config.json"


def sha256(file: Path) -> str:
    """Of a file's content, hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_received(file: Path, name: str, sha256_of_it: str | None = None) -> None:
    """Compares a file of the hub's cache with the digest that the hub gave for it; any other file
    has none. Raises SourceError where they differ.

    sha256_of_it: where it is known already.
    """
    given = _given_digest(file)
    if _SHA256.fullmatch(given):
        found = sha256_of_it or sha256(file)
    elif _GIT.fullmatch(given):
        found = git_hash(file.read_bytes())
    else:
        return
    if found != given:
        raise SourceError(
            f"{name}: {file.name} is damaged: its digest is {found}, the hub's is {given}; "
            f"{get_again(file)}"
        )


def get_again(file: Path) -> str:
    """What to do about a damaged file."""
    if not _given_digest(file):
        return "fetch or copy it again"
    return f"delete {os.path.realpath(file)} and run the command again to fetch it anew"


@contextlib.contextmanager
def linked(files: Mapping[str, Path], called: str) -> Iterator[Path]:
    """A directory of this name that holds these files, or directories, under these names and
    nothing else: what transformers reads there is what was looked at here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / called
        directory.mkdir()
        for name, path in files.items():
            try:
                (directory / name).symlink_to(path.absolute())
            except OSError:
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, directory / name)
        yield directory


def check_there(file: Path, name: str) -> None:
    """Raises SourceError for what only stands for a file: a link to nothing, a pointer of git-lfs.
    What is not there at all is none of it.
    """
    if file.is_symlink() and not file.exists():
        raise SourceError(
            f"{name}: {file.name} is a link to {os.readlink(file)}, which does not exist; copy the "
            "file itself"
        )
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(_POINTER))
    except OSError:  # whoever reads it says why
        return
    if begins == _POINTER:
        raise SourceError(
            f"{name}: {file.name} is a pointer of git-lfs, not the file itself; run `git lfs pull` "
            "in its directory"
        )


def looks_like(names: Collection[str], hub_id: str | None = None) -> str:
    """What was expected of a directory, or of a repository of the hub, that is no model which
    transformers can load: by the names of its files.
    """
    if "manifest.json" in names:
        return (
            "a model to compile, but this is a compiled simulator: use it with `tintc run` or "
            "tintc.load"
        )
    if ADAPTER in names:
        return (
            "a whole model, but this is an adapter: merge it into its base model and save that "
            "with save_pretrained"
        )
    whole = "a model that transformers can load" if hub_id else _WRITTEN
    if files := sorted(file for file in names if file.endswith(".gguf")):
        fetched = f", fetched with `hf download {hub_id} {files[0]}`" if hub_id else " in it"
        return f"{whole}, or the path of one GGUF file: {files[0]}{fetched}"
    if hub_id and not names:
        return "a model, but this revision holds no files"
    return whole


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object that a file holds. Raises SourceError for anything else."""
    check_there(path, name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{name} has a {path.name} that cannot be read ({first_line(error)}); {get_again(path)}"
        ) from error
    if not isinstance(values, dict):
        raise SourceError(
            f"{name} has a {path.name} that holds a {type(values).__name__}; expected a JSON object"
        )
    return values


def _given_digest(file: Path) -> str:
    """The digest in the name of what a file of the cache links to; empty for any other file."""
    if not file.is_symlink():
        return ""
    target = Path(os.readlink(file))
    return target.name if target.parent.name == _BLOBS else ""
