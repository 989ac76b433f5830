"""tintc export: artifact -> ONNX model, and how far onnxruntime is from torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintc.commands import console
from tintc.ir.errors import UsageError

if TYPE_CHECKING:
    import torch

    from tintc.compiler.onnx import Exported, ExportedPair
    from tintc.compiler.onnx.comparison import Check


# compiler/onnx/streaming.py, compiler/onnx/decoding.py
_MANY = ("slots.", "past.", "next.slots.", "present.", "updates.", "past_key_values.")


def run(
    path: Path,
    target: Path,
    further: Sequence[str],
    dtype: torch.dtype | None,
    options: dict[str, Any],
    *,
    pair: bool,
    as_json: bool,
) -> None:
    """Exports and prints what was written. further: optional inputs and outputs."""
    from tintc.compiler.onnx import Exported
    from tintc.compiler.onnx.inputs import OPTIONAL
    from tintc.compiler.onnx.model import OUTPUTS

    unknown = [name for name in further if name not in (*OPTIONAL, *OUTPUTS)]
    if unknown:
        raise UsageError(
            f"--with is {', '.join(unknown)}; expected {', '.join(OPTIONAL)} or "
            f"{', '.join(OUTPUTS[1:])}"
        )
    inputs = [name for name in further if name in OPTIONAL]
    outputs = [name for name in further if name in OUTPUTS]
    if pair and outputs:
        raise UsageError(
            f"--with is {', '.join(outputs)}; a pair has outputs of its own: expected some of "
            f"{', '.join(OPTIONAL)}"
        )
    asked = {**options, "inputs": inputs}
    exported = (
        _pair(path, target.expanduser(), dtype, asked)
        if pair
        else _one(path, target.expanduser(), dtype, {**asked, "outputs": ["logits", *outputs]})
    )
    if as_json:
        console.print_json(exported.to_dict())
    elif isinstance(exported, Exported):
        _print(exported)
    else:
        _print_pair(exported)


def _one(path: Path, target: Path, dtype: torch.dtype | None, options: dict[str, Any]) -> Exported:
    from tintc.compiler.artifact import load
    from tintc.compiler.onnx import export_onnx
    from tintc.compiler.onnx.files import check_target

    check_target(target, force=options["force"])
    with console.stages(5) as stage:
        stage("load")
        return export_onnx(load(path, dtype=dtype), target, progress=stage, **options)


def _pair(
    path: Path, target: Path, dtype: torch.dtype | None, options: dict[str, Any]
) -> ExportedPair:
    from tintc.compiler.artifact import load
    from tintc.compiler.onnx import export_onnx_pair
    from tintc.compiler.onnx.pair import check_pair_target

    check_pair_target(target, force=options["force"])
    with console.stages(5) as stage:
        stage("load")
        return export_onnx_pair(load(path, dtype=dtype), target, progress=stage, **options)


def _print_pair(exported: ExportedPair) -> None:
    rows = {
        "folder": f"{exported.path}: {exported.file_bytes / 1e6:.1f} MB, of which "
        f"{exported.weight_bytes / 1e6:.1f} MB are weights",
        "graphs": f"{exported.nodes} operators of opset {exported.opset}",
        **{f"inputs of {name}": _listed(found) for name, found in exported.inputs.items()},
        **{f"outputs of {name}": _listed(found) for name, found in exported.outputs.items()},
        **_errors(exported.check),
    }
    console.print_table(console.named(rows))
    if not console.Verbosity.quiet:
        console.err.print(
            f"wrote {exported.path} in {exported.seconds:.1f} s; next: tintc run {exported.path} "
            "--file FILE --generate 200",
            markup=False,
        )


def _print(exported: Exported) -> None:
    beside = "" if exported.data is None else f", weights in {exported.data.name}"
    rows = {
        "model": f"{exported.path}: {exported.file_bytes / 1e6:.1f} MB{beside}, of which "
        f"{exported.weight_bytes / 1e6:.1f} MB are weights",
        "graph": f"{exported.nodes} operators of opset {exported.opset}",
        "inputs": _listed(exported.inputs),
        "outputs": _listed(exported.outputs),
        **_errors(exported.check),
    }
    console.print_table(console.named(rows))
    if not console.Verbosity.quiet:
        run = f"tintc run {exported.path} --text '...'"
        after = "call it chunk by chunk (docs/guides/onnx.md)" if exported.stream else run
        console.err.print(
            f"wrote {exported.path} in {exported.seconds:.1f} s; next: {after}", markup=False
        )


def _errors(check: Check | None) -> dict[str, str]:
    if check is None:
        return {}
    found = {
        f"error of {name}": f"{each.error:.1e}, allowed {each.limit:.1e}; the largest number is "
        f"{each.largest:.3g}"
        for name, each in check.outputs.items()
    }
    return {**found, "compared on": "; ".join(check.inputs)}


def _listed(names: tuple[str, ...]) -> str:
    """By name; of slots and cached keys, which are as many as the weights, how many."""
    plain = [name for name in names if not name.startswith(_MANY)]
    counts = {start: sum(name.startswith(start) for name in names) for start in _MANY}
    return ", ".join([*plain, *(f"{n} {start}NAME" for start, n in counts.items() if n)])
