"""Options of `tintc export`, and the folder that it may write. Nothing here imports torch.

Annotations are no strings here, as in options.py.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tintc.commands.flags import WHOLE
from tintc.ir.errors import UsageError

PAIR = ("adapt.onnx", "decode.onnx", "pair.json")


def is_pair(path: Path) -> bool:
    """Whether a directory is an exported pair, or what is left of one."""
    return any((path.expanduser() / name).is_file() for name in PAIR)


_OF_STREAMS = ("chunk", "context", "keys")


@dataclass(frozen=True, kw_only=True)
class Exporting:
    """How an ONNX model is written."""

    opset: Annotated[
        int | None, WHOLE, Parameter(help="Of ONNX's standard operators, 18 to 23; default 20.")
    ] = None
    external_data: Annotated[bool, Parameter(help="Weights in FILE.data, as above 2 GB.")] = False
    optimize: Annotated[bool, Parameter(help="Fold constants with onnxscript.")] = False
    check: Annotated[
        bool,
        Parameter(negative=None, help="Compare onnxruntime with torch before anything is left."),
    ] = True
    force: Annotated[bool, Parameter(help="Replace a model that exists.")] = False
    pair: Annotated[
        bool,
        Parameter(
            negative=(),
            help="In place of a model, a folder: adapt.onnx trains on a context once, decode.onnx "
            "goes on from any text under what it gave, with cached keys.",
        ),
    ] = False
    stream: Annotated[
        bool,
        Parameter(
            negative=(),
            help="In place of a call, the program of one window of a stream: scores it, trains on "
            "it, returns weights and state, which the next one takes.",
        ),
    ] = False
    chunk: Annotated[
        int | None,
        WHOLE,
        Parameter(help="With --stream: targets of a chunk, told in the metadata; default 128."),
    ] = None
    context: Annotated[
        int | None,
        WHOLE,
        Parameter(help="With --stream: tokens in front of a chunk, told there; default 384."),
    ] = None
    keys: Annotated[
        Literal["recompute", "cache"] | None,
        Parameter(
            help="With --stream: keys of the context are computed anew (default), or are further "
            "inputs and outputs."
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """Of `export_onnx`, or of `export_onnx_pair` where a pair is asked for. Raises UsageError
        for options of the other one.
        """
        given = dataclasses.asdict(self)
        if given.pop("pair"):
            own = {name: given.pop(name) for name in ("external_data", "stream", *_OF_STREAMS)}
            if names := [name.replace("_", "-") for name, value in own.items() if value]:
                raise UsageError(
                    f"--{', --'.join(names)} with --pair, whose programs are its own and whose "
                    "weights lie in one file; expected one of the two"
                )
        return {name: value for name, value in given.items() if value is not None}
