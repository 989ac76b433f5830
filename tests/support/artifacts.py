"""One tiny model on disk and its compiled artifacts, built once a process; tests that change one
take a copy.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import tintc
from tests.support.models import opt
from tintc import save
from tintc.compiler.artifact_reader import manifest_digest, seal_of
from tintc.ir.config import SimulatorConfig

VOCAB, POSITIONS, LAYERS = 4096, 64, 2
TEXT = (
    "The river rises in the hills above the town. It runs through the town, and then the river "
    "meets the sea."
)


@lru_cache(maxsize=1)
def workshop() -> Path:
    """A folder that goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="tintc-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@lru_cache(maxsize=1)
def source_directory() -> Path:
    """A random OPT as save_pretrained writes it, with the tokenizer of tiny-opt."""
    folder = workshop() / "model"
    opt(
        vocab=VOCAB, hidden=12, heads=3, ffn=20, layers=LAYERS, positions=POSITIONS
    ).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(resources.files("tintc") / "data" / "tiny-opt" / name), folder)
    return folder


@lru_cache(maxsize=4)
def artifact(preset: str = "paper") -> Path:
    """What `tintc compile` writes for the model above. Read only: see `copy_of`."""
    config = SimulatorConfig.preset(preset, inner_lr=0.01)
    return save(tintc.compile(str(source_directory()), config), workshop() / preset)


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of an artifact that a test may change."""
    shutil.copytree(folder, target)
    return target


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Writes back what `change` returns, or, where it returns nothing, what it changed in place."""
    value = json.loads(file.read_text(encoding="utf-8"))
    changed = change(value)
    file.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")


def seal(root: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> Path:
    """Changes the manifest and makes every checksum match what lies there, as a forger would."""

    def reseal(manifest: dict[str, Any]) -> None:
        names = (
            file.relative_to(root).as_posix()
            for file in root.rglob("*")
            if file.is_file() and file.name != "manifest.json"
        )
        manifest["files"] = {name: seal_of(root / name).model_dump() for name in names}
        change(manifest)
        manifest["manifest_sha256"] = manifest_digest(manifest)

    edit_json(root / "manifest.json", reseal)
    return root
