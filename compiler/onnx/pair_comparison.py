"""Whether an exported pair computes what the simulator computes: contexts are adapted to, and a
text is read under the updates, part by part, in onnxruntime and in torch.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintc.compiler.onnx.comparison import (
    TOLERANCE,
    Check,
    Difference,
    batch_of,
    note,
    opened,
    prompts,
    wide_reference,
)
from tintc.compiler.onnx.stream_comparison import follows_rounding
from tintc.runtime.onnx_pair import ADAPT, DECODE, UPDATE, OnnxPair
from tintc.runtime.simulator import Simulator

PARTS = (5, 1, 1, 3)  # new tokens of the first calls; one call reads the rest


def compare_pair(simulator: Simulator, folder: Path, inputs: tuple[str, ...]) -> Check:
    """Updates, where they do not follow rounding, and logits of every token under them; one row of
    several is padded on its left. Raises NumericalError if onnx's checker refuses a model.
    """
    pair = OnnxPair(opened(folder / ADAPT), opened(folder / DECODE))
    reference, limit = wide_reference(simulator), TOLERANCE[simulator.dtype]
    result = Check({"logits": Difference()})
    if not follows_rounding(simulator.config):
        result.outputs["updates"] = Difference()
    for said, ids in prompts(simulator):
        result.inputs.append(f"{said}, {ids.shape[0]} x {ids.shape[1]}")
        trained = batch_of(ids, inputs).trained()
        tensors: dict[str, Any] = {
            name: value for name, value in trained.items() if isinstance(value, Tensor)
        }
        feed = {name: value.numpy() for name, value in tensors.items()}
        updates = pair.adapt(**feed, inner_lr=float(simulator.inner_lr.detach()))
        adapted = reference.adapt(**tensors, form="weights")
        if "updates" in result.outputs:
            for slot, value in adapted.updates.values.items():
                found = torch.from_numpy(updates.values[f"{UPDATE}{slot}"].numpy())
                note(result.outputs["updates"], found, value.cpu(), limit)
        mask = _padded(ids)
        expected = adapted(ids.to(reference.device), mask.to(reference.device)).logits.cpu()
        decoding = pair.decoding(updates)
        for part in _parts(ids.shape[1]):
            logits = torch.from_numpy(decoding(ids[:, part].numpy(), mask[:, part].numpy()))
            real = mask[:, part] != 0
            note(result.outputs["logits"], logits[real], expected[:, part][real], limit)
    return result


def _padded(ids_BT: Tensor) -> Tensor:
    mask = torch.ones_like(ids_BT)
    mask[1:2, : ids_BT.shape[1] // 4] = 0
    return mask


def _parts(tokens: int) -> Iterator[slice]:
    start = 0
    for size in (*PARTS, tokens):
        if start < tokens:
            yield slice(start, min(start + size, tokens))
        start += size
