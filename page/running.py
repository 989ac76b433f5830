"""What the browser needs to run the simulator: the exported model, the tokenizer, and what they
take.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper

from tintc.compiler.artifact_files import write_json
from tintc.compiler.onnx import export_onnx, export_onnx_pair
from tintc.compiler.onnx.model import tokenizer_json
from tintc.compiler.onnx.pair import ABOUT_FILE, WEIGHTS
from tintc.compiler.tokenizer_files import write_tokenizer
from tintc.ir.errors import MemoryLimitError, NumericalError, UnsupportedModelError, UsageError
from tintc.ir.outputs import Output
from tintc.page.examples import EXAMPLES
from tintc.runtime.onnx_pair import ADAPT, DECODE
from tintc.runtime.simulator import Simulator

LIMIT_MB = 300
_MODEL, _FOLDER = "simulator.onnx", "model"
_TRAIN, _DECODE = "train.onnx", "decode.onnx"  # of a pair, on the page
_REFUSED = (UnsupportedModelError, UsageError, NumericalError, MemoryLimitError)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """model: whether the page gets one. megabytes: the largest that it gets."""

    model: bool = True
    megabytes: float = LIMIT_MB

    def __post_init__(self) -> None:
        if not self.megabytes > 0:
            raise UsageError(f"limit_mb is {self.megabytes:g}; expected more than 0 MB")


def write_model(
    simulator: Simulator, root: Path, limits: Limits, progress: Progress
) -> tuple[dict[str, Any] | None, str | None]:
    """(data/run.json, or None; why there is none). Its files are in `root` then."""
    if (reason := _too_much(simulator, limits)) is not None:
        return None, reason
    progress("export the model")
    plain = _in_float32(simulator)
    folder = root / _FOLDER
    target = folder / _MODEL
    kinds = (Output.LOSSES, Output.INITIAL_LOSSES)
    try:
        export_onnx(plain, target, outputs=kinds)
    except _REFUSED as error:
        shutil.rmtree(folder, ignore_errors=True)
        return None, f"This simulator cannot be exported to ONNX: {_one_line(error)}"
    if (size := target.stat().st_size) > limits.megabytes * 1e6:
        shutil.rmtree(folder)
        return None, _larger(size, limits)
    progress("export the pair")
    pair = _write_pair(plain, folder, limits)
    _write_tokenizer(simulator.tokenizer, root / "tokenizer")
    return _described(simulator, target, pair), None


def _too_much(simulator: Simulator, limits: Limits) -> str | None:
    """Why there is no model, as far as that is known before it is written."""
    if not limits.model:
        return "This page was made without the model."
    if tokenizer_json(simulator.tokenizer) is None:
        return "This simulator has no tokenizer that a browser can run."
    numbers = sum(tensor.numel() for tensor in simulator.prefix.tensors().values())
    size = numbers * torch.float32.itemsize
    return _larger(size, limits) if size > limits.megabytes * 1e6 else None


def _larger(size: int, limits: Limits) -> str:
    return (
        f"The model has {size / 1e6:,.0f} MB in float32, too much for a browser: the limit of this "
        f"page is {limits.megabytes:,.4g} MB."
    )


def _in_float32(simulator: Simulator) -> Simulator:
    """What the browser's kernels compute in."""
    return simulator if simulator.dtype == torch.float32 else copy.deepcopy(simulator).float()


def _write_pair(simulator: Simulator, folder: Path, limits: Limits) -> dict[str, Any] | None:
    """Adapting and decoding, for generation; None where there is no pair, or a larger one."""
    made = folder / "pair"
    try:
        exported = export_onnx_pair(simulator, made)
    except _REFUSED:
        return None
    about = json.loads((made / ABOUT_FILE).read_text(encoding="utf-8"))
    names = {ADAPT: _TRAIN, DECODE: _DECODE, WEIGHTS: WEIGHTS}  # the models name the last one
    fits = exported.file_bytes <= limits.megabytes * 1e6
    for file in made.iterdir():
        if fits and file.name in names:
            file.rename(folder / names[file.name])
        else:
            file.unlink()
    made.rmdir()
    if not fits:
        return None
    return {
        **{name: value for name, value in about.items() if name not in ("config", "files")},
        "train": f"{_FOLDER}/{_TRAIN}",
        "decode": f"{_FOLDER}/{_DECODE}",
        "external": [{"path": f"{_FOLDER}/{WEIGHTS}", "bytes": (folder / WEIGHTS).stat().st_size}],
        "bytes": sum((folder / name).stat().st_size for name in names.values()),
    }


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer of the text alone: what stands in front of it is told beside it (`prepend`),
    so that every library puts the same there.
    """
    folder.mkdir()
    write_tokenizer(tokenizer, folder)
    plain = json.loads(tokenizer_json(tokenizer) or "{}")
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    write_json(folder / "tokenizer.json", {**plain, "post_processor": None}, indent=None)


def _described(simulator: Simulator, target: Path, pair: dict[str, Any] | None) -> dict[str, Any]:
    graph = onnx.load(str(target), load_external_data=False).graph
    facts = simulator.program.facts
    return {
        "model": f"{_FOLDER}/{_MODEL}",
        "external": [],
        "bytes": target.stat().st_size,
        "inputs": {value.name: _input(value.type.tensor_type) for value in graph.input},
        "outputs": [value.name for value in graph.output],
        "max_tokens": facts.longest,
        "inner_lr": float(simulator.inner_lr.detach()),
        "vocab": facts.vocab_size,
        "dtype": "float32",
        "tokenizer": "tokenizer/tokenizer.json",
        "tokenizer_config": "tokenizer/tokenizer_config.json",
        "prepend": _in_front(simulator.tokenizer),
        "examples": [{"name": name, "text": text} for name, text in EXAMPLES.items()],
        "pair": pair,
    }


def _input(kind: Any) -> dict[str, Any]:
    dims = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return {"dtype": helper.tensor_dtype_to_np_dtype(kind.elem_type).name, "shape": dims}


def _in_front(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts in front of every text."""
    text = "a"
    whole, plain = (
        list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        for special in (True, False)
    )
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return [int(token) for token in whole[:start]]
    return []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
