"""Where a stream of documents was stopped: a file from which it goes on with the same bits.

It holds what the streams carry, sums so far, and a `Stopped` (`described_tensors.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor

from tintc.compiler.artifact_schema import Digest
from tintc.compiler.described_tensors import TensorFile, reason
from tintc.ir.errors import ArtifactError, UsageError
from tintc.runtime.digest import digest_of

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


_FILE = TensorFile(
    key="tintc.stream",
    about=Stopped,
    name="the state of a stream",
    expected="state of a stream; expected one, or a new name",
    again="remove it to start anew",
)


def write_state(path: Path, tensors: Mapping[str, Tensor], about: Stopped) -> None:
    """Writes the file; what was there is replaced when it is whole. Raises ArtifactError if it
    cannot be written.
    """
    found = {name: value.contiguous() for name, value in tensors.items()}
    try:
        _FILE.write(path, found, about.model_copy(update={"sha256": digest_of(found)}))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {path}: {reason(error)}") from error


def read_state(path: Path) -> tuple[dict[str, Tensor], Stopped]:
    """Reads what `write_state` wrote. Raises UsageError for what is no file, ArtifactError for a
    file of another kind, cut short or altered.
    """
    if not path.is_file():  # a pipe may never end
        raise UsageError(f"{path} is no plain file; expected the state of a stream, or a new name")
    tensors, about = _FILE.read(path)
    _FILE.check_digest(path, tensors, about.sha256)
    return tensors, about
