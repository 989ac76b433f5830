"""The simulator that a command reads, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from tintc.commands.prompt import Tokenize
from tintc.compiler.artifact import load
from tintc.ir.errors import InputError
from tintc.runtime.simulator import Simulator


def load_at_rate(
    path: Path, inner_lr: float | None, device: str | None, dtype: torch.dtype | None
) -> Simulator:
    """At another inner learning rate than the compiled one, if one is given."""
    simulator = load(path, device=device, dtype=dtype)
    if inner_lr is not None:
        simulator.inner_lr.data.fill_(inner_lr)
    return simulator


def tokenizing(simulator: Simulator) -> Tokenize:
    """Text -> token ids. Raises InputError for a simulator without a tokenizer."""
    tokenizer = simulator.tokenizer
    if tokenizer is None:
        raise InputError(
            "this artifact has no tokenizer (its source had none); call the simulator from Python "
            "with token ids"
        )

    def tokenize(text: str) -> list[int]:
        found: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return found

    return tokenize
