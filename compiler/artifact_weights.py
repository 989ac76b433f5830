"""The weights of an artifact: a safetensors file that is mapped, not read.

Loading costs no memory of its own: pages come from the file when they are first read, and processes
that load the same artifact share them. The mapping is private: who writes to a weight gets pages of
his own, and the file stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tintc.compiler.artifact_files import INNER_LR
from tintc.compiler.artifact_schema import Seal
from tintc.ir.errors import ArtifactError
from tintc.ir.inputs import is_wide_table
from tintc.ir.precision import HALF

LINE = 64  # bytes: where torch's own tensors start; elsewhere other kernels round differently
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(tensors: Mapping[str, Tensor], file: Path) -> Seal:
    """Writes a safetensors file that can be used where it is mapped, and seals it.

    safetensors' own `save_file` puts tensors one behind the other in an order of its own, most of
    them between two lines. Here those of whole lines come first, and start at one.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % LINE != 0, name))
    header: dict[str, dict[str, str | list[int]]] = {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end = start + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(struct.calcsize("<Q") + len(text)) % LINE)
    begins = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(begins)
    # Hashing takes as long as writing; both leave Python to another thread.
    with file.open("wb") as handle, ThreadPoolExecutor(1) as beside:
        handle.write(begins)
        for name in names:
            numbers = tensors[name].detach().cpu().contiguous().flatten()
            data = numbers.view(torch.uint8).numpy().data
            hashed = beside.submit(digest.update, data)
            handle.write(data)
            hashed.result()
    return Seal(bytes=len(begins) + end, sha256=digest.hexdigest())


def read_weights(
    file: Path, device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of such a file, and of one that safetensors wrote. dtype: of the weights; default
    as stored. What has to be another number, or starts between two lines, is copied.

    Raises ArtifactError.
    """
    try:
        with safe_open(file, framework="pt", device=str(device)) as handle:
            names: list[str] = list(handle.keys())
            tensors = {name: _placed(name, handle.get_tensor(name), dtype) for name in names}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    if INNER_LR not in tensors:
        raise ArtifactError(f"{file} holds no {INNER_LR}; compile the model again")
    return tensors


def _placed(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    changes = dtype is not None and tensor.is_floating_point() and name != INNER_LR
    wanted = torch.float32 if is_wide_table(name) and dtype in HALF else dtype
    return tensor.to(
        wanted if changes else tensor.dtype,
        copy=tensor.device.type == "cpu" and tensor.data_ptr() % LINE != 0,
    )
