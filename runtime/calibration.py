"""The calibration of this machine: measured once for a device, dtype and number of threads, and
kept in the user's cache directory.

TINTC_CALIBRATION=off takes the fixed one, TINTC_CALIBRATION=FILE the one in a file. Where nothing
can be kept nothing is measured: results would differ from process to process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tintc.ir.calibration import KERNELS, Calibration, Point, fixed
from tintc.ir.errors import UsageError
from tintc.ir.precision import computed_dtype, dtype_name
from tintc.runtime import calibrating
from tintc.runtime.machine import device_name

VARIABLE = "TINTC_CALIBRATION"
FORMAT = 2  # 1: of weights in the cache
OFF = fixed("off")  # stands for the fixed one of whatever device
_LOG = logging.getLogger("tintc.calibration")
_KNOWN: dict[Path, Calibration] = {}
_LOCK = threading.RLock()
_LARGEST = 1 << 20  # bytes of a file that may be one


class _PointFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kernel: str
    rows: int = Field(gt=0)
    inner: int = Field(gt=0)
    columns: int = Field(gt=0)
    rate: float = Field(gt=0, allow_inf_nan=False)


class _File(BaseModel):
    """What is kept. digest: of all else, so that a damaged file is none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    key: dict[str, str]
    points: list[_PointFile] = Field(min_length=1)
    bandwidth: float = Field(gt=0, allow_inf_nan=False)
    digest: str


def calibration_of(device: torch.device | str, dtype: torch.dtype) -> Calibration:
    """What optimizations choose by here: forced by the environment, kept, or measured now. Raises
    UsageError for a forced file that is no calibration.
    """
    device = torch.device(device)
    forced = os.environ.get(VARIABLE, "")
    if forced == "off" or (not forced and device.type not in ("cpu", "cuda")):
        return fixed(device.type)
    if forced:
        return read(Path(forced).expanduser(), device.type)
    path = cache_file(device, dtype)
    with _LOCK:
        if path not in _KNOWN:
            kept = kept_in(path, key_of(device, dtype))
            _KNOWN[path] = renewed(device, dtype) if kept is None else kept
        return _KNOWN[path]


Wanted = Calibration | str | Path  # `auto`, `off`, a file, or one that somebody made


def wanted_calibration(value: Wanted) -> Calibration | None:
    """What a simulator is asked to choose by; None for `auto`, the machine's own. Raises
    UsageError for a file that is none.
    """
    if isinstance(value, Calibration):
        return value
    if value == "auto":
        return None
    if value == "off":
        return OFF
    return _asked(Path(value).expanduser(), "calibration", "auto, off,")


def speed_of(weight: Tensor, wanted: Calibration | None = None) -> Calibration:
    """By what programs on such weights choose. Nothing is measured while torch traces, or of
    weights without numbers.
    """
    kind = weight.device.type
    if wanted is not None:
        return wanted if wanted.device == kind and wanted.measured else fixed(kind)
    if torch.compiler.is_compiling() or isinstance(weight, FakeTensor):
        return fixed(kind)
    return calibration_of(weight.device, computed_dtype(weight.dtype, kind))


def renewed(device: torch.device | str, dtype: torch.dtype) -> Calibration:
    """Measured now and kept; the fixed one where nothing can be written."""
    device = torch.device(device)
    path, key = cache_file(device, dtype), key_of(device, dtype)
    with _LOCK:
        if not _is_writable(path.parent):
            _LOG.info("%s cannot be written: choices are the fixed ones", path.parent)
            return fixed(device.type)
        found = calibrating.measure(str(device), dtype, about={"from": str(path), **key})
        try:
            write(found, key, path)
        except OSError as error:
            _LOG.info("%s cannot be written (%s): choices are the fixed ones", path, error)
            return fixed(device.type)
        _KNOWN[path] = found
        return found


def state(device: torch.device | str, dtype: torch.dtype) -> str:
    """Where choices on a device come from, without measuring anything."""
    forced = os.environ.get(VARIABLE, "")
    path = cache_file(torch.device(device), dtype)
    if forced:
        return "fixed" if forced == "off" else forced
    kept = kept_in(path, key_of(torch.device(device), dtype))
    return f"{device}, measured at the first call" if kept is None else str(path)


def key_of(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What a calibration depends on."""
    return {
        "device": device.type,
        "processor": device_name(str(device)),
        "dtype": dtype_name(dtype),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def cache_file(device: torch.device, dtype: torch.dtype) -> Path:
    """Where it is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    text = json.dumps(key_of(device, dtype), sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return root / "tintc" / "calibration" / f"{name}.json"


def kept_in(path: Path, key: dict[str, str] | None = None) -> Calibration | None:
    """What a file holds; None if it is no calibration, or one with another key."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        given = _File.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
    plain = given.model_dump()
    same = given.digest == _digest(plain) and given.format == FORMAT
    if not same or (key is not None and given.key != key):
        return None
    if any(point.kernel not in KERNELS for point in given.points):
        return None
    points = tuple(Point(**point.model_dump()) for point in given.points)
    about = {"from": str(path), **given.key}
    return Calibration(given.key.get("device", "cpu"), points, given.bandwidth, about)


def read(path: Path, device: str) -> Calibration:
    """A file that was asked for. Raises UsageError if it is no calibration of such a device."""
    with _LOCK:
        if path not in _KNOWN:
            _KNOWN[path] = _asked(path, VARIABLE, "off,")
        found = _KNOWN[path]
    return found if found.device == device else fixed(device)


def _asked(path: Path, name: str, others: str) -> Calibration:
    """What a file holds that `name` names. others: what else it may be."""
    found = kept_in(path)
    if found is None:
        raise UsageError(
            f"{name} is {str(path)!r}, which is no calibration; expected {others} or a file that "
            "tintc env wrote"
        )
    return found


def write(found: Calibration, key: dict[str, str], path: Path) -> None:
    """Whole or not at all. Raises OSError."""
    plain: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "points": [vars(point) for point in found.points],
        "bandwidth": found.bandwidth,
    }
    plain["digest"] = _digest(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        try:
            json.dump(plain, file, indent=1)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _digest(plain: dict[str, Any]) -> str:
    known = {name: value for name, value in plain.items() if name != "digest"}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
