"""Published shapes of models, `shape:NAME`: configs without weights, of `data/shapes.json`."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tintc.compiler.frontend.kinds import SHAPE
from tintc.ir.errors import SourceError


def shape_names() -> list[str]:
    """The names that can follow `shape:`."""
    return list(_shapes())


def shape_config(name: str) -> PreTrainedConfig:
    """Of `shape:NAME`. Raises SourceError if there is no such shape."""
    shapes, shape = _shapes(), name.removeprefix(SHAPE)
    if shape not in shapes:
        raise SourceError(f"there is no shape {shape!r}; the shapes are {', '.join(shapes)}")
    return AutoConfig.for_model(**shapes[shape])


def _shapes() -> dict[str, dict[str, Any]]:
    text = resources.files("tintc").joinpath("data", "shapes.json").read_text(encoding="utf-8")
    shapes: dict[str, dict[str, Any]] = json.loads(text)
    return shapes
