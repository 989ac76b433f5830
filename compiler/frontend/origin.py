"""Where a node of torch.export comes from: the module and the line that wrote it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import torch
from torch import fx

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch's word for none
ATTRIBUTE = (
    "auxiliary"  # where the wrapper that is exported holds the model; stripped from every name
)


def module_path(node: fx.Node) -> str:
    """Path of the auxiliary module that a node of torch.export stands in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    if path == _NO_MODULE:
        return ""
    return in_model(str(path))


def in_model(path: str) -> str:
    """A path below the wrapper that is exported, as the model itself has it."""
    return path.removeprefix(ATTRIBUTE).removeprefix(".")


def region_line(node: fx.Node) -> str:
    """The first line of a region's body: the node that holds it has none."""
    for read in node.all_input_nodes if node.graph.owning_module is not None else ():
        body = getattr(node.graph.owning_module, str(read.target), None)
        if read.op == "get_attr" and isinstance(body, fx.GraphModule):
            return next(filter(None, map(source_line, body.graph.nodes)), "")
    return ""


def source_line(node: fx.Node) -> str:
    """`package/file.py:12` of the innermost frame outside torch; no folder of this machine."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    libraries = _libraries()
    return _short([f for f in frames if not f[0].startswith(libraries)] or frames)


def line_outside(frames: Sequence[tuple[str, int]]) -> str:
    """The same of frames of a traceback; "" if all are torch's or ours."""
    libraries = _libraries()
    return _short([f for f in frames if not f[0].startswith(libraries)])


def _libraries() -> tuple[str, ...]:
    own = os.path.dirname(str(sys.modules[__name__].__file__))
    return os.path.dirname(str(torch.__file__)), os.path.dirname(own)


def _short(frames: Sequence[tuple[str, str | int]]) -> str:
    if not frames:
        return ""
    path, line = frames[-1]
    parts = path.replace("\\", "/").split("/site-packages/")
    short = parts[-1] if len(parts) > 1 else path.replace("\\", "/").rsplit("/", 1)[-1]
    return f"{short}:{line}"
