"""Whether an exported model computes what its simulator computes: onnx's checker, then onnxruntime
beside torch.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor

from tintc.ir.errors import NumericalError
from tintc.ir.outputs import Output
from tintc.runtime.batch import Batch
from tintc.runtime.labels import check_labels
from tintc.runtime.simulator import Simulator

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

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


def agreeing(found: Check) -> Check:
    """Raises NumericalError unless it agrees."""
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


def compare(
    simulator: Simulator, path: Path, inputs: tuple[str, ...], outputs: tuple[Output, ...]
) -> Check:
    """Runs both on random inputs of several shapes and on a text. Raises NumericalError if onnx's
    checker refuses the model.
    """
    session = opened(path)
    reference = wide_reference(simulator)
    result = Check({kind.value: Difference() for kind in outputs})
    with_labels = any(kind.of_losses for kind in outputs)
    for said, ids in prompts(simulator):
        batch, labels = batch_of(ids, inputs), _labels(ids) if with_labels else None
        result.inputs.append(f"{said}, {ids.shape[0]} x {ids.shape[1]}")
        found = session.run(list(result.outputs), _feed(simulator, batch, labels))
        expected = _expected(reference, batch, labels, outputs)
        for kind, value in zip(outputs, found, strict=True):
            difference, limit = result.outputs[kind], TOLERANCE[simulator.dtype]
            note(difference, torch.from_numpy(value), expected[kind], limit)
    return result


def opened(path: Path, threads: int = 0) -> InferenceSession:
    """The model in onnxruntime. threads: 0 for as many as it takes by itself. Raises NumericalError
    if onnx's checker refuses it.
    """
    import onnxruntime

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise NumericalError(f"onnx's checker refuses the exported model: {error}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of every constant that it does not fold
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feed(
    simulator: Simulator, batch: Batch, labels: Tensor | None
) -> dict[str, np.ndarray[Any, Any]]:
    """What the exported model is given."""
    given = {**batch.trained(), "labels": labels}
    feed = {name: value.numpy() for name, value in given.items() if isinstance(value, Tensor)}
    return {**feed, "inner_lr": rate_of(simulator)}


def rate_of(simulator: Simulator) -> np.ndarray[Any, Any]:
    """The input inner_lr."""
    dtype = np.float64 if simulator.dtype == torch.float64 else np.float32
    return simulator.inner_lr.detach().cpu().numpy().astype(dtype)


def note(difference: Difference, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Of one more pair of tensors."""
    error = float((found.double() - expected.double()).abs().max())
    difference.error = max(difference.error, error) if error == error else float("inf")
    difference.largest = max(difference.largest, float(expected.abs().max()))
    difference.limit = tolerance * max(1.0, difference.largest)


def wide_reference(simulator: Simulator) -> Simulator:
    """The simulator, of float16 one of the same weights in float32."""
    if simulator.dtype != torch.float16:
        return simulator
    wide = {name: tensor.float() for name, tensor in simulator.prefix.tensors().items()}
    options: dict[str, Any] = {"backend": simulator.backend, "share": simulator.share}
    made = Simulator(simulator.program, wide, **options)
    made.inner_lr.data.copy_(simulator.inner_lr.detach())
    return made


def prompts(simulator: Simulator) -> list[tuple[str, Tensor]]:
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


def batch_of(ids: Tensor, inputs: tuple[str, ...]) -> Batch:
    """Half of the tokens trained, the last sequence less; the second sequence padded on the left
    where there is a mask for it.
    """
    batch, tokens = ids.shape
    columns = torch.arange(tokens)
    ends = torch.full((batch, 1), max(2, tokens // 2))
    ends[-1] = max(2, tokens // 3)
    given = {}
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
    return Batch(ids, (columns < ends).long(), **given)


def _labels(ids: Tensor) -> Tensor:
    return torch.where(torch.arange(ids.shape[1]) % 4 == 3, -100, ids)


@torch.inference_mode()
def _expected(
    simulator: Simulator, batch: Batch, labels: Tensor | None, outputs: tuple[Output, ...]
) -> dict[Output, Tensor]:
    initial = any(kind.is_before for kind in outputs)
    found: dict[Output, Tensor | None] = {}
    if any(not kind.of_losses for kind in outputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a sequence without a target is meant
            out = simulator(**batch.trained(), return_initial=initial)
        found = {Output.LOGITS: out.logits, Output.INITIAL_LOGITS: out.initial_logits}
    if labels is not None:
        checked = check_labels(labels, batch.input_ids, simulator.program.facts.vocab_size)
        losses = simulator.losses(**batch.trained(), labels=checked, return_initial=initial)
        found |= {
            Output.LOSSES: losses.losses,
            Output.INITIAL_LOSSES: losses.initial_losses,
        }
    return {kind: tensor.cpu() for kind in outputs if (tensor := found[kind]) is not None}
