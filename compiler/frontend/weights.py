"""Weight files of a checkpoint: which there are, that each is whole, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import safetensors

from tintc.compiler.frontend.files import check_received, get_again, read_json, sha256
from tintc.compiler.frontend.messages import first_line, listed
from tintc.ir.errors import SourceError


def weight_names(directory: Path, present: Collection[str], name: str) -> list[str]:
    """The weight files among `present`, in transformers' order of preference; an index in
    `directory` names its shards.

    Raises SourceError for an index that cannot be read.
    """
    for file in ("model.safetensors", "pytorch_model.bin"):
        if file in present:
            return [file]
        if f"{file}.index.json" in present:
            shards = read_json(directory / f"{file}.index.json", name).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise SourceError(
                    f"{name}: {file}.index.json has no weight_map; expected one written by "
                    "save_pretrained"
                )
            return sorted({str(shard) for shard in shards.values()})
    return []


def weight_files(directory: Path, name: str) -> list[Path]:
    """The weight files, all there and every safetensors file whole."""
    names = weight_names(directory, [path.name for path in directory.iterdir()], name)
    if not names:
        raise SourceError(
            f"{name} has no weights; expected model.safetensors (or its shards and index) or "
            "pytorch_model.bin"
        )
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
