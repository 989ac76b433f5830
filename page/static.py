"""The page itself, as web/ builds it into `static`: what every site holds beside its data."""

from __future__ import annotations

import gzip
import shutil
from importlib import resources
from pathlib import Path

RUNTIME = "runtime"  # onnxruntime-web's, which Run fetches
_PACKED = ".gz"


def copy_static(root: Path, *, runtime: bool) -> None:
    """Writes it to `root`. runtime: also what runs a model, which lies packed in the package."""
    with resources.as_file(resources.files("tintc.page") / "static") as static:
        leave = () if runtime else (RUNTIME,)
        shutil.copytree(
            static, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*leave, ".*")
        )
    for packed in (root / RUNTIME).glob(f"*{_PACKED}"):
        with gzip.open(packed) as source, packed.with_suffix("").open("wb") as target:
            shutil.copyfileobj(source, target)
        packed.unlink()
