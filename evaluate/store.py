"""Results as they come: one JSON line a unit, so that an interrupted run goes on where it stopped.

A line is {"key": ..., "unit": {...}, "result": {...}}. The key is the sha256 of the unit and of
what all units of the store share (model, version), and nothing else: not of the batch size, of the
order of work or of how many units there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tintc.ir.errors import InputError
from tintc.version import __version__


class Store:
    """Results by unit, in memory and, with a path, in a file that they are appended to.

    shared: what the result of every unit depends on. A last line that was cut off by an
    interruption is dropped. Raises InputError for a file that is something else.
    """

    def __init__(self, path: Path | None, shared: dict[str, Any]) -> None:
        self._shared = {**shared, "tintc": __version__}
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        self.found = self.computed = 0
        if path is not None and path.exists():
            self._read(path)

    def key(self, unit: dict[str, Any]) -> str:
        """What the unit is stored under."""
        text = json.dumps({"shared": self._shared, "unit": unit}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, unit: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a unit that was computed before, or None."""
        result = self._results.get(self.key(unit))
        self.found += result is not None
        return result

    def put(self, unit: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Keeps a result, on the disk too before it returns; floats come back as they went in."""
        key = self.key(unit)
        self._results[key] = result
        self.computed += 1
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "unit": unit, "result": result}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return result

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} cannot be read: {error}; expected the results of an earlier run"
            ) from None
        complete, _, torn = text.rpartition("\n")
        for number, line in enumerate(complete.split("\n") if complete else (), 1):
            try:
                entry = json.loads(line)
                self._results[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}, line {number}, is no result of an earlier run; choose another output "
                    "or remove the file"
                ) from None
        if torn:
            with path.open("r+b") as file:
                file.truncate(len(complete.encode()) + (1 if complete else 0))
