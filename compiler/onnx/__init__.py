"""Exports a simulator to ONNX: fine-tuning inside any runtime that has ONNX's standard operators,
and nothing else.

model = build(...)   nodes from the simulator's own code, weights, metadata:
                     graph, operators, shapes, inputs, stream, trace, steps, model
write(model, ...)    one file, or weights beside it; atomic: files
compare(...)         onnx's checker, then onnxruntime beside torch: comparison
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tintc.compiler.onnx.comparison import Check, compare
from tintc.compiler.onnx.files import LARGEST, check_target, data_file, staged, write
from tintc.compiler.onnx.inputs import check_inputs
from tintc.compiler.onnx.model import Model, build, check_outputs, check_standard
from tintc.ir.errors import NumericalError, UsageError
from tintc.ir.outputs import Output
from tintc.runtime.simulator import Simulator

DEFAULT_OPSET = 20


@dataclass(frozen=True)
class Exported:
    """path: of the model. data: of its external weights, or None. inputs: all that the model takes,
    by their names there. nodes: how many operators.
    weight_bytes: of weights. file_bytes: of both files. check: None where it was not asked for.
    seconds: all of it."""

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
    optimize: fold constants by onnxscript. check: compare with this simulator before anything is
    left at `path`.

    Raises UsageError for what cannot be asked for or written, UnsupportedModelError where a
    standard operator is missing, NumericalError if the check fails.
    """
    start, path = time.monotonic(), Path(path).expanduser()
    check_target(path, force=force)
    simulator.check_has_numbers()
    progress("write the graph")
    model = build(simulator, inputs, outputs, opset)
    if optimize:
        progress("optimize")
        _optimize(model)
    external = external_data or model.weight_bytes > LARGEST
    report = None
    names, wanted = check_inputs(inputs), check_outputs(outputs)
    nodes = len(model.proto.graph.node)
    takes = tuple(value.name for value in model.proto.graph.input)
    with staged(path) as written:
        progress("write the weights")
        write(model, written, external=external)
        size = sum(file.stat().st_size for file in (written, data_file(written)) if file.exists())
        weight_bytes = model.weight_bytes
        del model
        if check:
            progress("check")
            report = _checked(simulator, written, names, wanted)
    data = data_file(path) if external else None
    return Exported(
        path,
        data,
        opset,
        takes,
        tuple(kind.value for kind in wanted),
        nodes,
        weight_bytes,
        size,
        round(time.monotonic() - start, 2),
        report,
    )


def _checked(
    simulator: Simulator, path: Path, inputs: tuple[str, ...], outputs: tuple[Output, ...]
) -> Check:
    found = compare(simulator, path, inputs, outputs)
    if not found.agrees:
        wrong = ", ".join(
            f"{name} by {difference.error:.1e} (allowed {difference.limit:.1e})"
            for name, difference in found.outputs.items()
            if not difference.agrees
        )
        raise NumericalError(
            f"onnxruntime disagrees with the simulator: {wrong}; nothing was left behind"
        )
    return found


def _optimize(model: Model) -> None:
    """Folds constants and drops what nothing reads; larger weights are not touched."""
    try:
        from onnxscript import optimizer
    except ModuleNotFoundError as error:
        raise UsageError("optimize=True needs onnxscript; pip install 'tintc[onnx]'") from error
    optimizer.fold_constants(model.proto)
    optimizer.remove_unused_nodes(model.proto)
    check_standard(model.proto)
