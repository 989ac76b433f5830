"""Whether an exported model computes what its simulator computes: onnx's checker, then onnxruntime
beside torch.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from tintc.ir.errors import NumericalError
from tintc.runtime.labels import check_labels
from tintc.runtime.simulator import Simulator

# Largest difference that is allowed, times the largest number where that is above 1. float16:
# against the same weights in float32.
# float32: rounding of gradients at a large rate shows in the logits of both; 2e-4 was seen with
# random weights at the default rate.
# float64: onnxruntime keeps scales of products and the epsilon of norms as float32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-4, torch.float16: 2e-2}
SHAPES = ((1, 2), (2, 19), (3, 64))  # of random inputs, cut to what the simulator takes
TEXT = (
    "The river rises in the hills above the town. In spring the river carries ice, and the people "
    "of the town watch the river."
)


@dataclass
class Difference:
    """Of one output, over all inputs. error: the largest absolute difference. largest: the largest
    number. limit: of error, for it.
    """

    error: float = 0.0
    largest: float = 0.0
    limit: float = 0.0

    @property
    def agrees(self) -> bool:
        return self.error <= self.limit


@dataclass
class Check:
    """outputs: by name. inputs: what both were called on."""

    outputs: dict[str, Difference]
    inputs: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return all(difference.agrees for difference in self.outputs.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "agrees": self.agrees,
            "inputs": self.inputs,
            "outputs": {name: vars(difference) for name, difference in self.outputs.items()},
        }


def compare(
    simulator: Simulator, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Check:
    """Runs both on random inputs of several shapes and on a text. Raises NumericalError if onnx's
    checker refuses the model.
    """
    import onnxruntime

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise NumericalError(f"onnx's checker refuses the exported model: {error}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every constant that it does not fold
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    reference = _reference(simulator)
    result = Check({name: Difference() for name in outputs})
    for said, ids in _prompts(simulator):
        given = _given(ids, inputs, any("losses" in name for name in outputs))
        result.inputs.append(f"{said}, {ids.shape[0]} x {ids.shape[1]}")
        rate = simulator.inner_lr.detach()
        feed = {name: value.numpy() for name, value in given.items()}
        feed["inner_lr"] = (
            rate.cpu()
            .numpy()
            .astype(np.float64 if simulator.dtype == torch.float64 else np.float32)
        )
        found = dict(zip(outputs, session.run(list(outputs), feed), strict=True))
        for name, expected in _expected(reference, given, outputs).items():
            _note(
                result.outputs[name],
                torch.from_numpy(found[name]),
                expected,
                TOLERANCE[simulator.dtype],
            )
    return result


def _note(difference: Difference, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found.double() - expected.double()).abs().max())
    difference.error = max(difference.error, error) if error == error else float("inf")
    difference.largest = max(difference.largest, float(expected.abs().max()))
    difference.limit = tolerance * max(1.0, difference.largest)


def _reference(simulator: Simulator) -> Simulator:
    """The simulator, of float16 one of the same weights in float32."""
    if simulator.dtype != torch.float16:
        return simulator
    wide = {name: tensor.float() for name, tensor in simulator.prefix.tensors().items()}
    options: dict[str, Any] = {"backend": simulator.backend, "share": simulator.share}
    made = Simulator(simulator.program, wide, **options)
    made.inner_lr.data.copy_(simulator.inner_lr.detach())
    return made


def _prompts(simulator: Simulator) -> list[tuple[str, Tensor]]:
    facts = simulator.program.facts
    generator = torch.Generator().manual_seed(0)
    longest = facts.longest or max(tokens for _, tokens in SHAPES)
    found = [
        (
            "random",
            torch.randint(facts.vocab_size, (batch, min(tokens, longest)), generator=generator),
        )
        for batch, tokens in SHAPES
    ]
    if simulator.tokenizer is not None:
        ids = simulator.tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :longest]
        found.append(("text", ids))
    return found


def _given(ids: Tensor, inputs: tuple[str, ...], labels: bool) -> dict[str, Tensor]:
    """Half of the tokens trained, the last sequence less; the second sequence padded on the left
    where there is a mask for it.
    """
    batch, tokens = ids.shape
    columns = torch.arange(tokens)
    ends = torch.full((batch, 1), max(2, tokens // 2))
    ends[-1] = max(2, tokens // 3)
    given = {"input_ids": ids, "train_mask": (columns < ends).long()}
    if "loss_mask" in inputs:
        given["loss_mask"] = (columns % 3 != 2).long().expand(batch, tokens).contiguous()
    valid = torch.ones_like(ids)
    if batch > 1:
        valid[1, : tokens // 4] = 0
    if "attention_mask" in inputs:
        given["attention_mask"] = valid
    if "pair_mask" in inputs:
        block = columns // max(2, tokens // 3)
        given["attention_mask"] = (
            (block[:, None] == block[None]).long().expand(batch, tokens, tokens).contiguous()
        )
    if "position_ids" in inputs:
        given["position_ids"] = (columns % max(2, tokens // 2)).expand(batch, tokens).contiguous()
    if labels:
        given["labels"] = torch.where(columns % 4 == 3, -100, ids)
    return given


@torch.inference_mode()
def _expected(
    simulator: Simulator, given: dict[str, Tensor], outputs: tuple[str, ...]
) -> dict[str, Tensor]:
    inputs = {name: value for name, value in given.items() if name != "labels"}
    initial = any("initial" in name for name in outputs)
    found: dict[str, Tensor | None] = {}
    if any("logits" in name for name in outputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a sequence without a target is meant
            out = simulator(**inputs, return_initial=initial)
        found = {"logits": out.logits, "initial_logits": out.initial_logits}
    if "labels" in given:
        labels = check_labels(
            given["labels"], given["input_ids"], simulator.program.facts.vocab_size
        )
        losses = simulator.losses(**inputs, labels=labels, return_initial=initial)
        found |= {"losses": losses.losses, "initial_losses": losses.initial_losses}
    return {name: tensor.cpu() for name in outputs if (tensor := found[name]) is not None}
