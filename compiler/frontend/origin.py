"""Where a node of torch.export comes from: the module and the line that wrote it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import uninteresting_files

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch's word for none
ATTRIBUTE = (
    "auxiliary"  # where the wrapper that is exported holds the model; stripped from every name
)


@contextmanager
def lines_of_strings() -> Iterator[None]:
    """In it, torch also notes the lines of code that was made by exec, whose file is `<string>`."""
    left_out = uninteresting_files()
    before = "<string>" in left_out
    left_out.discard("<string>")
    try:
        yield
    finally:
        if before:
            left_out.add("<string>")


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
    return line_outside(frames)


def line_outside(frames: Sequence[tuple[str, str | int]]) -> str:
    """The same of frames of a traceback; "" if all are torch's or ours."""
    own = os.path.dirname(str(sys.modules[__name__].__file__))
    libraries = os.path.dirname(str(torch.__file__)), os.path.dirname(own)
    outside = [frame for frame in frames if not frame[0].startswith(libraries)]
    if not outside:
        return ""
    path, line = outside[-1]
    parts = path.replace("\\", "/").split("/site-packages/")
    short = parts[-1] if len(parts) > 1 else path.replace("\\", "/").rsplit("/", 1)[-1]
    return f"{short}:{line}"
