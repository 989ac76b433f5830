"""Weight files of a checkpoint: which there are, that each is whole, and their digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

import safetensors

from tintc.compiler.frontend.files import (
    ADAPTER,
    check_received,
    check_there,
    get_again,
    looks_like,
    read_json,
    sha256,
)
from tintc.compiler.frontend.messages import first_line, listed
from tintc.ir.errors import SourceError

_USUAL = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
SUFFIXES = (".safetensors", ".bin")


def weight_names(
    directory: Path, present: Collection[str], name: str, chosen: object = None
) -> list[str]:
    """The weight files that transformers reads, if they are among `present`; an index in
    `directory` names its shards.

    chosen: `transformers_weights` of the config, which goes before the usual names. Raises
    SourceError for an index that cannot be read, or a name that leads out of the directory.
    """
    for file in _candidates(chosen, name):
        if file in present:
            return _shards(directory / file, name) if file.endswith(_INDEX) else [file]
    return []


def _candidates(chosen: object, name: str) -> list[str]:
    if chosen is None:
        return [file + ending for file in _USUAL for ending in ("", _INDEX)]
    file = str(chosen)
    if not (_is_inside(file) and file.endswith((".safetensors", f".safetensors{_INDEX}"))):
        raise SourceError(
            f"{name}: transformers_weights in its config.json is {file!r}; expected a "
            ".safetensors file of the same directory, or the index of several"
        )
    return [file]


def _shards(index: Path, name: str) -> list[str]:
    shards = read_json(index, name).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise SourceError(
            f"{name}: {index.name} has no weight_map; expected one written by save_pretrained"
        )
    found = sorted({str(shard) for shard in shards.values()})
    outside = [shard for shard in found if not _is_inside(shard)]
    if outside:
        raise SourceError(
            f"{name}: {index.name} names {listed(outside)}, outside the model's directory; "
            "expected files beside it, as save_pretrained writes them"
        )
    return found


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and path.suffix != ""


def no_weights(
    name: str, files: Collection[str], chosen: object, hub_id: str | None = None
) -> SourceError:
    """The error for a model without weights, which may have them in another form. files: those that
    it has; hub_id: where that is on the hub.
    """
    if chosen is not None:
        expected = f"{chosen}, which its config.json names"
    elif ADAPTER in files or any(file.endswith(".gguf") for file in files):
        expected = looks_like([file for file in files if file != "manifest.json"], hub_id)
    else:
        expected = "model.safetensors (or its shards and index) or pytorch_model.bin"
    return SourceError(f"{name} has no weights; expected {expected}")


def weight_files(directory: Path, name: str, chosen: object = None) -> list[Path]:
    """The weight files, all there and every safetensors file whole. chosen: see `weight_names`."""
    present = [file for file in _candidates(chosen, name) if os.path.lexists(directory / file)]
    names = weight_names(directory, present, name, chosen)
    if not names:
        raise no_weights(name, os.listdir(directory), chosen)
    for file in names:
        check_there(directory / file, name)
    absent = [file for file in names if not (directory / file).is_file()]
    if absent:
        raise SourceError(
            f"{name} lacks {listed(absent)}, which its index names; fetch or copy the missing files"
        )
    for file in names:
        if file.endswith(".safetensors"):
            try:
                with safetensors.safe_open(directory / file, framework="pt"):
                    pass  # opening checks the header and the length
            except Exception as error:
                raise SourceError(
                    f"{name}: {file} is truncated or damaged ({first_line(error)}); "
                    f"{get_again(directory / file)}"
                ) from error
    return [directory / file for file in names]


def digest(files: Sequence[Path], name: str) -> str:
    """The SHA-256 of one file; of several, that of their hexadecimal digests joined in order of
    their names. Raises SourceError for a file that is not what the hub has.
    """
    digests = []
    for path in sorted(files):
        digests.append(sha256(path))
        check_received(path, name, digests[-1])
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )
