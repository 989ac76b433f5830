"""Where a stream of documents was stopped: a file from which it goes on with the same bits.

The file is safetensors: what the streams carry, sums so far, and `Stopped` as JSON in its metadata.
It is replaced whole, never written into.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tintc.compiler import beside
from tintc.compiler.artifact_files import open_to_others
from tintc.compiler.artifact_schema import Digest
from tintc.ir.errors import ArtifactError, UsageError
from tintc.runtime.digest import digest_of

_KEY = "tintc.stream"  # of the metadata
_ANEW = "remove it to start anew"
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
Size = Annotated[int, Field(ge=0, lt=2**63)]


class Written(BaseModel):
    """What a file that grows held: its first bytes, and their CRC-32."""

    model_config = _STRICT
    bytes: Size
    crc32: Size


class Stopped(BaseModel):
    """texts: digest of the documents. steps: behind the stream. scores: the file of scores, if
    there is one. sha256: of the tensors.
    """

    model_config = _STRICT
    version: Literal[1] = 1
    texts: Digest
    steps: Size
    scores: Written | None
    sha256: Digest = "0" * 64


def write_state(path: Path, tensors: Mapping[str, Tensor], about: Stopped) -> None:
    """Writes the file; what was there is replaced when it is whole. Raises ArtifactError if it
    cannot be written.
    """
    found = {name: value.contiguous() for name, value in tensors.items()}
    said = about.model_copy(update={"sha256": digest_of(found)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.clear(path.absolute())
        with beside.temporary(path.absolute()) as folder:
            save_file(found, folder / path.name, {_KEY: said.model_dump_json()})
            open_to_others(folder)
            (folder / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArtifactError(f"cannot write {path}: {reason}") from error


def read_state(path: Path) -> tuple[dict[str, Tensor], Stopped]:
    """Reads what `write_state` wrote. Raises UsageError for what is no file, ArtifactError for a
    file of another kind, cut short or altered.
    """
    if not path.is_file():  # a pipe may never end
        raise UsageError(f"{path} is no plain file; expected the state of a stream, or a new name")
    try:
        with safe_open(path, framework="pt") as handle:
            written = (handle.metadata() or {}).get(_KEY)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} cannot be read as the state of a stream: {str(error)[:200]}; {_ANEW}"
        ) from error
    if written is None:
        raise ArtifactError(f"{path} holds no state of a stream; expected one, or a new name")
    try:
        about = Stopped.model_validate_json(written)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise ArtifactError(
            f"{path} is malformed at {place}: {first['msg'][:200]}; {_ANEW}"
        ) from None
    if digest_of(tensors) != about.sha256:
        raise ArtifactError(f"{path} is altered or damaged: its sha256 is another; {_ANEW}")
    return tensors, about
