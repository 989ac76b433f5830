"""Exports a simulator to ONNX: fine-tuning inside any runtime that has ONNX's standard operators,
and nothing else.

model = build(...)   nodes from the simulator's own code, weights, metadata:
                     graph, operators, shapes, inputs, stream, trace, steps, model
build_window(...)    the program of one window of a stream: streaming
build_pair(...)      one model that adapts, one that decodes with cached keys: decoding, pair
write(model, ...)    one file, or weights beside it; atomic: files
compare(...)         onnx's checker, then onnxruntime beside torch: comparison, stream_comparison
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tintc.compiler.onnx.comparison import Check, agreeing, compare
from tintc.compiler.onnx.files import LARGEST, check_target, data_file, staged, write
from tintc.compiler.onnx.inputs import check_inputs
from tintc.compiler.onnx.model import DEFAULT_OPSET, Model, build, check_outputs, fold_constants
from tintc.compiler.onnx.pair import ExportedPair, export_onnx_pair
from tintc.compiler.onnx.stream_comparison import compare_stream
from tintc.compiler.onnx.streaming import build_window
from tintc.ir.errors import UsageError
from tintc.ir.outputs import Output
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_settings import Keys, StreamSettings

__all__ = [
    "Exported",
    "ExportedPair",
    "export_onnx",
    "export_onnx_pair",
]


@dataclass(frozen=True)
class Exported:
    """path: of the model. data: of its external weights, or None. inputs: all that the model takes,
    by their names there. nodes: how many operators.
    weight_bytes: of weights. file_bytes: of both files. check: None where it was not asked for.
    seconds: all of it. stream: whether it is the program of a stream's window."""

    path: Path
    data: Path | None
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    weight_bytes: int
    file_bytes: int
    seconds: float
    check: Check | None = None
    stream: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As one JSON document."""
        plain = {
            **vars(self),
            "path": str(self.path),
            "data": None if self.data is None else str(self.data),
        }
        return {**plain, "check": None if self.check is None else self.check.to_dict()}


def export_onnx(
    simulator: Simulator,
    path: str | Path,
    *,
    inputs: Collection[str] = (),
    outputs: Collection[str] = (Output.LOGITS,),
    opset: int = DEFAULT_OPSET,
    external_data: bool = False,
    optimize: bool = False,
    stream: bool = False,
    chunk: int | None = None,
    context: int | None = None,
    keys: Keys | None = None,
    check: bool = True,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes one model with dynamic batch and length, its weights inside it, above 2 GB or with
    external_data in `path` + ".data".

    Its inputs are input_ids, train_mask, inner_lr (a scalar) and those asked for of loss_mask,
    attention_mask (B, T), pair_mask (the attention_mask of (B, T, T)) and position_ids; with losses
    among the outputs also labels (B, T), -100 ignored. outputs: some of logits, initial_logits
    (both (B, T, V)), losses and initial_losses (both (B, T), of the next token at each position).
    optimize: fold constants by onnxscript.

    stream: in place of a call, the program of one window of a stream, which has inputs and outputs
    of its own (docs/guides/onnx.md). chunk and context, 128 and 384, are told in the metadata; the
    program runs any. keys: "recompute", or "cache" where keys of the context are inputs.

    check: compare with this simulator before anything is left at `path`.

    Raises UsageError for what cannot be asked for or written, UnsupportedModelError where a
    standard operator is missing, NumericalError if the check fails.
    """
    start, path = time.monotonic(), Path(path).expanduser()
    check_target(path, force=force)
    simulator.check_has_numbers()
    settings = _settings(stream, chunk=chunk, context=context, keys=keys)
    kind = _call(inputs, outputs) if settings is None else _window(inputs, outputs, settings)
    progress("write the graph")
    model = kind.build(simulator, opset)
    if optimize:
        progress("optimize")
        fold_constants(model)
    external = external_data or model.weight_bytes > LARGEST
    report = None
    graph = model.proto.graph
    nodes = len(graph.node)
    takes, gives = ([value.name for value in values] for values in (graph.input, graph.output))
    with staged(path) as written:
        progress("write the weights")
        write(model, written, external=external)
        size = sum(file.stat().st_size for file in (written, data_file(written)) if file.exists())
        weight_bytes = model.weight_bytes
        del model, graph
        if check:
            progress("check")
            report = agreeing(kind.compare(simulator, written))
    return Exported(
        path,
        data_file(path) if external else None,
        opset,
        tuple(takes),
        tuple(gives),
        nodes,
        weight_bytes,
        size,
        round(time.monotonic() - start, 2),
        report,
        stream,
    )


class _Kind(NamedTuple):
    """What is exported: how its model is built, and how it is compared with the simulator."""

    build: Callable[[Simulator, int], Model]
    compare: Callable[[Simulator, Path], Check]


def _settings(stream: bool, **given: Any) -> StreamSettings | None:
    """None of a call. Raises UsageError for what is of a stream, where none is asked for."""
    known = {name: value for name, value in given.items() if value is not None}
    if known and not stream:
        raise UsageError(f"{next(iter(known))} is of a stream; expected stream beside it")
    return StreamSettings(**known) if stream else None


def _call(inputs: Collection[str], outputs: Collection[str]) -> _Kind:
    names, wanted = check_inputs(inputs), check_outputs(outputs)
    return _Kind(
        lambda simulator, opset: build(simulator, names, wanted, opset),
        lambda simulator, path: compare(simulator, path, names, wanted),
    )


def _window(inputs: Collection[str], outputs: Collection[str], settings: StreamSettings) -> _Kind:
    """Raises UsageError for inputs and outputs of a call."""
    further = [*inputs, *(name for name in outputs if name != Output.LOGITS)]
    if further:
        raise UsageError(
            "the program of a stream's window has inputs and outputs of its own; got "
            f"{', '.join(map(str, further))}: expected stream alone, or a call's inputs and outputs"
        )
    return _Kind(
        lambda simulator, opset: build_window(simulator, settings, opset),
        lambda simulator, path: compare_stream(simulator, path, settings),
    )
