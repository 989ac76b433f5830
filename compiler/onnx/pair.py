"""A folder that adapts and decodes without torch: two models (`decoding.py`), their weights in one
file, the tokenizer.

    adapt.onnx, decode.onnx   the models
    weights.data              weights of both; what both read lies there once
    tokenizer.json, ...       as transformers saves it, where the source had one
    pair.json                 what a program needs to know that does not read ONNX's metadata
    genai_config.json         what onnxruntime-genai needs to know, where it can run the model
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tintc.compiler.artifact_files import check_target, replacing, write_json
from tintc.compiler.onnx.comparison import Check, agreeing
from tintc.compiler.onnx.decoding import build_pair, cached, check_pair
from tintc.compiler.onnx.files import write_shared
from tintc.compiler.onnx.genai import GENAI_CONFIG, genai_config
from tintc.compiler.onnx.inputs import check_inputs
from tintc.compiler.onnx.model import DEFAULT_OPSET, Model, fold_constants
from tintc.compiler.onnx.pair_comparison import compare_pair
from tintc.compiler.tokenizer_files import write_tokenizer
from tintc.ir.errors import UsageError
from tintc.runtime.onnx_pair import ABOUT, ADAPT, DECODE
from tintc.runtime.simulator import Simulator
from tintc.version import __version__

WEIGHTS, ABOUT_FILE = "weights.data", "pair.json"
_FORMAT = 1


@dataclass(frozen=True)
class ExportedPair:
    """path: the folder. inputs, outputs: of each model, by its file's name. nodes: operators of
    both. weight_bytes: of `weights.data`. file_bytes: of all files. check: None where it was not
    asked for. seconds: all of it.
    """

    path: Path
    opset: int
    inputs: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]
    nodes: int
    weight_bytes: int
    file_bytes: int
    seconds: float
    check: Check | None = None

    def to_dict(self) -> dict[str, Any]:
        """As one JSON document."""
        check = None if self.check is None else self.check.to_dict()
        return {**vars(self), "path": str(self.path), "check": check}


def export_onnx_pair(
    simulator: Simulator,
    path: str | Path,
    *,
    inputs: Collection[str] = (),
    opset: int = DEFAULT_OPSET,
    optimize: bool = False,
    check: bool = True,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> ExportedPair:
    """Writes a folder of two models with dynamic batch, cache and length, which together do what
    `simulator.adapt` and `Adapted.generate` do.

    `adapt.onnx` takes input_ids, train_mask, inner_lr and those asked for of loss_mask,
    attention_mask, pair_mask and position_ids, and gives `updates.SLOT` (B, ...). `decode.onnx`
    takes input_ids and position_ids (B, T), attention_mask (B, P + T), the updates,
    `past_key_values.N.key` and `.value` (B, G, P, E) and logits_to_keep, by default 0 for all, and
    gives logits (B, K, V) and `present.N...` (docs/guides/onnx.md). optimize: fold constants by
    onnxscript. check: compare with this simulator before anything is left at `path`.

    Raises UsageError for what cannot be asked for or written, UnsupportedModelError where a
    standard operator is missing, NumericalError if the check fails.
    """
    start, path = time.monotonic(), Path(path).expanduser()
    names = check_inputs(inputs)
    check_pair(simulator)
    check_pair_target(path, force=force)
    simulator.check_has_numbers()
    progress("write the graphs")
    models = dict(zip((ADAPT, DECODE), build_pair(simulator, names, opset), strict=True))
    if optimize:
        progress("optimize")
        for model in models.values():
            fold_constants(model)
    report = None
    with replacing(path) as folder:
        progress("write the weights")
        _write(simulator, models, opset, folder)
        sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        if check:
            progress("check")
            report = agreeing(compare_pair(simulator, folder, names))
    graphs = {name: model.proto.graph for name, model in models.items()}
    return ExportedPair(
        path,
        opset,
        {name: tuple(value.name for value in graph.input) for name, graph in graphs.items()},
        {name: tuple(value.name for value in graph.output) for name, graph in graphs.items()},
        sum(len(graph.node) for graph in graphs.values()),
        sizes[folder / WEIGHTS],
        sum(sizes.values()),
        round(time.monotonic() - start, 2),
        report,
    )


def check_pair_target(path: Path, *, force: bool) -> None:
    """Raises UsageError unless a pair can be written to this folder."""
    if path.suffix == ".onnx":
        raise UsageError(f"the output is {path}; expected the name of a folder, which a pair is")
    check_target(path, force=force, manifest=ABOUT_FILE, kind="ONNX pair of tintc's")


def _write(simulator: Simulator, models: dict[str, Model], opset: int, folder: Path) -> None:
    write_shared({folder / name: model for name, model in models.items()}, folder / WEIGHTS)
    write_tokenizer(simulator.tokenizer, folder)
    if (config := genai_config(simulator, cached(simulator).values())) is not None:
        write_json(folder / GENAI_CONFIG, config)
    about = {entry.key: entry.value for entry in models[ADAPT].proto.metadata_props}
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    said: dict[str, Any] = {
        "format_version": _FORMAT,
        "tintc": __version__,
        "opset": opset,
        **json.loads(about[ABOUT]),
        "inner_lr": float(about["tintc.inner_lr"]),
        "max_tokens": simulator.program.facts.longest,
        "eos_token_id": getattr(simulator.tokenizer, "eos_token_id", None),
        "vocabulary": simulator.program.facts.vocab_size,
        "config": json.loads(about["tintc.config"]),
        "files": files,
    }
    write_json(folder / ABOUT_FILE, said)
