"""Where a model goes: one file, or one and its weights beside it; both appear when both are
whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from onnx import TensorProto

from tintc.compiler import beside
from tintc.compiler.onnx.model import Model, raw, refer
from tintc.ir.errors import ArtifactError, UsageError

LARGEST = 2_000_000_000  # bytes of weights in one file: protobuf ends at 2 GiB
_ALIGNMENT = 4096  # so that runtimes can map weights instead of reading them


def data_file(path: Path) -> Path:
    """The file of external weights: `model.onnx` -> `model.onnx.data`."""
    return path.with_name(f"{path.name}.data")


def check_target(path: Path, *, force: bool) -> None:
    """Raises UsageError unless a model can be written to `path`, after removing what killed
    processes left beside it.
    """
    beside.clear(path.absolute())
    if path.suffix != ".onnx":
        raise UsageError(f"the output is {path}; expected a name that ends in .onnx")
    for file in (path, data_file(path)):
        if file.exists() and (not file.is_file() or not force):
            way = (
                "pass force=True to replace it, or another name"
                if file.is_file()
                else "it is no file: choose another name"
            )
            raise UsageError(f"{file} exists; {way}")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: {nearest} is no directory that can be written")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path of the same name in a directory of its own; what is written there goes to `path` if
    nothing is raised.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.temporary(path) as folder:
            written = folder / path.name
            yield written
            if data_file(written).exists():
                data_file(written).replace(data_file(path))
            else:
                data_file(path).unlink(missing_ok=True)
            written.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}; nothing was left behind"
        ) from error


def write(model: Model, path: Path, *, external: bool) -> None:
    """Writes the model with its weights inside, or in `data_file(path)`."""
    proto = model.proto
    if external:
        with data_file(path).open("wb") as file:
            for tensor in _missing(model):
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                offset = file.tell()
                file.write(raw(model.weights[tensor.name]))
                refer(tensor, data_file(path).name, offset, file.tell() - offset)
        path.write_bytes(proto.SerializeToString())
        return
    for tensor in _missing(model):
        tensor.raw_data = raw(model.weights[tensor.name])
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    path.write_bytes(proto.SerializeToString())


def write_shared(models: Mapping[Path, Model], data: Path) -> None:
    """Writes models of one folder, whose weights lie in one file; equal ones lie there once."""
    places: dict[bytes, tuple[int, int]] = {}
    with data.open("wb") as file:
        for model in models.values():
            for tensor in _missing(model):
                content = raw(model.weights[tensor.name])
                key = hashlib.sha256(content).digest()
                if key not in places:
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    places[key] = file.tell(), len(content)
                    file.write(content)
                refer(tensor, data.name, *places[key])
    for path, model in models.items():
        path.write_bytes(model.proto.SerializeToString())


def _missing(model: Model) -> list[TensorProto]:
    return [
        tensor
        for tensor in model.proto.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    ]
