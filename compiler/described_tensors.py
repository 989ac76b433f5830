"""A file of tensors that says what they are: safetensors, with a pydantic model as JSON in its
metadata. It is replaced whole, never written into; who reads it knows what it should hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tintc.compiler import beside
from tintc.compiler.artifact_files import open_to_others
from tintc.compiler.artifact_reader import checked
from tintc.ir.errors import ArtifactError
from tintc.runtime.digest import digest_of

About = TypeVar("About", bound=BaseModel)


@dataclass(frozen=True)
class TensorFile(Generic[About]):
    """A kind of such files. key: of the metadata. about: what stands there. name, expected, again:
    what messages call the kind, what they expect instead, and what to do about a damaged one.
    """

    key: str
    about: type[About]
    name: str
    expected: str
    again: str

    def write(self, path: Path, tensors: Mapping[str, Tensor], about: About) -> None:
        """What was there is replaced when the file is whole. Raises OSError or SafetensorError,
        of which `reason` makes a line.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.clear(path.absolute())
        with beside.temporary(path.absolute()) as folder:
            save_file(dict(tensors), folder / path.name, {self.key: about.model_dump_json()})
            open_to_others(folder)
            (folder / path.name).replace(path)

    def read(self, path: Path) -> tuple[dict[str, Tensor], About]:
        """Raises ArtifactError for a file of another kind, cut short or malformed."""
        try:
            with safe_open(path, framework="pt") as handle:
                written = (handle.metadata() or {}).get(self.key)
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path} cannot be read as {self.name}: {str(error)[:200]}; {self.again}"
            ) from error
        if written is None:
            raise ArtifactError(f"{path} holds no {self.expected}")
        return tensors, checked(self.about.model_validate_json, written, path, self.again)

    def check_digest(self, path: Path, tensors: Mapping[str, Tensor], sha256: str) -> None:
        """Raises ArtifactError for other tensors than those that were written."""
        if digest_of(tensors) != sha256:
            raise ArtifactError(
                f"{path} is altered or damaged: its sha256 is another; {self.again}"
            )


def reason(error: OSError | SafetensorError) -> str:
    """Why a file could not be written."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
