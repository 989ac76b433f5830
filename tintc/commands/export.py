"""tintc export: artifact -> ONNX model, and how far onnxruntime is from torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintc.commands import console
from tintc.ir.errors import UsageError

if TYPE_CHECKING:
    import torch

    from tintc.compiler.onnx import Exported


_MANY = ("slots.", "past.", "next.slots.", "present.")  # compiler/onnx/streaming.py


def run(
    path: Path,
    target: Path,
    further: Sequence[str],
    dtype: torch.dtype | None,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Exports and prints what was written. further: optional inputs and outputs."""
    from tintc.compiler.artifact import load
    from tintc.compiler.onnx import export_onnx
    from tintc.compiler.onnx.files import check_target
    from tintc.compiler.onnx.inputs import OPTIONAL
    from tintc.compiler.onnx.model import OUTPUTS

    unknown = [name for name in further if name not in (*OPTIONAL, *OUTPUTS)]
    if unknown:
        raise UsageError(
            f"--with is {', '.join(unknown)}; expected {', '.join(OPTIONAL)} or "
            f"{', '.join(OUTPUTS[1:])}"
        )
    target = target.expanduser()
    check_target(target, force=options["force"])
    inputs, outputs = (
        [name for name in further if name in OPTIONAL],
        ["logits", *(name for name in further if name in OUTPUTS)],
    )
    with console.stages(5) as stage:
        stage("load")
        simulator = load(path, dtype=dtype)
        exported = export_onnx(
            simulator,
            target,
            inputs=inputs,
            outputs=outputs,
            progress=stage,
            **options,
        )
    if as_json:
        console.print_json(exported.to_dict())
        return
    _print(exported)


def _print(exported: Exported) -> None:
    beside = "" if exported.data is None else f", weights in {exported.data.name}"
    rows = {
        "model": f"{exported.path}: {exported.file_bytes / 1e6:.1f} MB{beside}, of which "
        f"{exported.weight_bytes / 1e6:.1f} MB are weights",
        "graph": f"{exported.nodes} operators of opset {exported.opset}",
        "inputs": _listed(exported.inputs),
        "outputs": _listed(exported.outputs),
    }
    if exported.check is not None:
        for name, found in exported.check.outputs.items():
            rows[f"error of {name}"] = (
                f"{found.error:.1e}, allowed {found.limit:.1e}; the largest number is "
                f"{found.largest:.3g}"
            )
        rows["compared on"] = "; ".join(exported.check.inputs)
    console.print_table(console.named(rows))
    if not console.Verbosity.quiet:
        run = f"tintc run {exported.path} --text '...'"
        after = "call it chunk by chunk (docs/guides/onnx.md)" if exported.stream else run
        console.err.print(
            f"wrote {exported.path} in {exported.seconds:.1f} s; next: {after}", markup=False
        )


def _listed(names: tuple[str, ...]) -> str:
    """By name; of slots and cached keys, which are as many as the weights, how many."""
    plain = [name for name in names if not name.startswith(_MANY)]
    counts = {start: sum(name.startswith(start) for name in names) for start in _MANY}
    return ", ".join([*plain, *(f"{n} {start}NAME" for start, n in counts.items() if n)])
