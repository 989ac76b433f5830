"""Gathers what the optimizer `rms` divides by: root mean squares of a model's gradients.

    RMS = sqrt(mean over chunks of g^2), elementwise;  g = the summed gradient of one chunk

A chunk has C targets; the window that they are scored in begins at most L tokens earlier, as in
TINT.md section 8. g is taken under W_0, by a compiled step: momentum's v after one step is
0 + g. Legend: B windows, T tokens of one, N tokens of the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from tintc.compiler.artifact_schema import Gathered
from tintc.compiler.exact import relowered
from tintc.compiler.gradient_statistics import (
    Statistics,
    digest_of_weights,
    gradients_of,
)
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, NumericalError, UsageError
from tintc.ir.inputs import is_models_own, is_table
from tintc.ir.outputs import Output
from tintc.ir.precision import dtype_name, wide
from tintc.runtime.batch import Batch
from tintc.runtime.call import Call
from tintc.runtime.digest import digest_of
from tintc.runtime.inputs import prepare
from tintc.runtime.prefix import put_rows
from tintc.runtime.simulator import Simulator

Progress = Callable[[str, int, int], None]
Window = tuple[int, int]  # its first token, and one behind the last of its targets
_STATE = "/momentum"  # behind a slot's name
GATHERING = "gradients of chunks"


@torch.inference_mode(False)  # whatever the caller is in: what is made outlives it
def gather_statistics(
    simulator: Simulator,
    ids_N: Tensor,
    *,
    chunk: int,
    context: int,
    batch: int = 1,
    progress: Progress = lambda text, done, total: None,
) -> Statistics:
    """Root mean squares of the gradients of every weight that the simulator trains, whatever its
    inner rule is; `lr_scale` leaves none out.

    ids_N: token ids of a text, not the one that is evaluated. chunk: C, targets of a chunk.
    context: L, tokens before a chunk at most, of which none is a target; the model must have
    C + L positions. A rest of fewer than C targets is left out. batch: chunks that run together;
    results do not depend on it. progress: what runs, chunks done, and how many there are.

    Memory: the model's, two numbers a trained weight, and `batch` more during a call. Gradients are
    sums over targets, never means. Raises UsageError for sizes that do not fit the model,
    InputError for a text of less than one chunk, NumericalError for gradients that are not finite.
    Source: TINT.md, section 7, `optimizer`.
    """
    simulator.check_has_numbers()
    _check(simulator, ids_N, chunk, context, batch)
    weights = {
        name: value.detach()
        for name, value in simulator.prefix.tensors().items()
        if is_models_own(name)
    }
    gradients = _gradients(simulator, weights)
    windows = _windows(len(ids_N), chunk, context)
    squares: dict[str, Tensor] = {}
    done = 0
    with torch.inference_mode():
        for group in _alike(windows, batch):
            progress(GATHERING, done, len(windows))
            for slot, g in _of_windows(gradients, ids_N, group, chunk).items():
                square = wide(g).square().sum(0)
                squares[slot] = squares[slot].add_(square) if slot in squares else square
            done += len(group)
    progress(GATHERING, done, len(windows))
    tensors = _roots(gradients, weights, squares, len(windows))
    about = Gathered(
        chunk=chunk,
        context=context,
        chunks=len(windows),
        gradients=gradients_of(simulator.config),
        weights=digest_of_weights(weights),
        source=simulator.source.get("sha256"),
        dtype=dtype_name(simulator.dtype),
        sha256=digest_of(tensors),
    )
    return Statistics(tensors, about)


def _check(simulator: Simulator, ids_N: Tensor, chunk: int, context: int, batch: int) -> None:
    for name, value, least in (("chunk", chunk, 1), ("context", context, 0), ("batch", batch, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}; expected at least {least}")
    longest = simulator.program.facts.longest
    if longest is not None and chunk + context > longest:
        raise UsageError(
            f"chunk {chunk} and context {context} make windows of {chunk + context} tokens; this "
            f"model takes {longest}"
        )
    if ids_N.ndim != 1:
        raise InputError(f"ids have shape {tuple(ids_N.shape)}; expected those of one text, (N,)")
    if len(ids_N) < chunk + 1:
        raise InputError(
            f"the text has {len(ids_N)} tokens; expected at least {chunk + 1}, for one chunk of "
            f"{chunk} targets: pass more text or a smaller chunk"
        )


def gathering_config(config: SimulatorConfig) -> SimulatorConfig:
    """A step of the same gradients, in which every trained weight keeps its gradient as a state."""
    return dataclasses.replace(config.by_plain_sgd(), steps=1, momentum=0.5)


def _gradients(simulator: Simulator, weights: dict[str, Tensor]) -> Simulator:
    program = relowered(simulator.program, gathering_config(simulator.config))
    held = simulator.prefix.tensors()
    tables = {name: value.detach() for name, value in held.items() if is_table(name)}
    return Simulator(program, {**tables, **weights})


def _windows(tokens: int, chunk: int, context: int) -> list[Window]:
    """Of every whole chunk: targets s <= t < e, the first chunk's from token 1 on."""
    starts = range(1, tokens - chunk + 1, chunk)
    return [(max(0, start - 1 - context), start + chunk) for start in starts]


def _alike(windows: list[Window], batch: int) -> Iterator[list[Window]]:
    """Neighbours of one length, so many together: those at the start of the text are shorter."""
    for _, group in groupby(windows, lambda window: window[1] - window[0]):
        alike = list(group)
        for first in range(0, len(alike), batch):
            yield alike[first : first + batch]


def _of_windows(
    gradients: Simulator, ids_N: Tensor, windows: list[Window], chunk: int
) -> dict[str, Tensor]:
    """Slot -> g of every window, (B, O, I) or (B, D). The last target is no input: a model needs no
    position for it.
    """
    ids_BT = torch.stack([ids_N[first : end - 1] for first, end in windows])
    targets_BT = torch.stack([ids_N[first + 1 : end] for first, end in windows])
    inputs = prepare(
        gradients.program.facts, gradients.dtype, gradients.device, Batch(ids_BT.to(torch.int64))
    )
    loss_BT = torch.zeros_like(inputs.tensors["loss_mask"])
    loss_BT[:, -chunk:] = 1
    tensors = {
        **inputs.tensors,
        "targets": targets_BT.to(gradients.device, torch.int64),
        "loss_mask": loss_BT,
    }
    states = gradients.run_states(
        Call((Output.STATES,), tensors, ids_BT.shape[1], causal=inputs.causal)
    )
    return {name.removesuffix(_STATE): value for name, value in states.items()}


def _roots(
    gradients: Simulator, weights: dict[str, Tensor], squares: dict[str, Tensor], chunks: int
) -> dict[str, Tensor]:
    """Parameter -> root mean square, from the sums of its slots. Raises NumericalError where one
    is not finite.
    """
    found: dict[str, Tensor] = {}
    for name, square in squares.items():
        slot = gradients.program.layout.prefix[name]
        whole = found.setdefault(slot.parameter, square.new_zeros(weights[slot.parameter].shape))
        put_rows(whole, slot, (square / chunks).sqrt())
    for parameter, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(
                f"the gradients of {parameter} are not finite in {gradients.dtype}; gather them in "
                "a wider dtype"
            )
    return {parameter: value.cpu().clone() for parameter, value in found.items()}
