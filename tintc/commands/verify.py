"""tintc verify: a compiled simulator against torch.autograd, in float64."""

from __future__ import annotations

from typing import Any

import torch

from tintc.commands import console
from tintc.commands.sheet import Sheet
from tintc.compiler.artifact import load
from tintc.compiler.driver import compile as compile_model
from tintc.compiler.verification import Verification, verify
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError


def run(
    source: str,
    made: tuple[SimulatorConfig, dict[str, Any]] | None,
    *,
    tokens: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Prints how far the updates are from the exact ones. made: config and options of what is
    compiled; None for an artifact as it is. Raises NumericalError on disagreement.
    """
    with console.stages(2 if made is None else 6) as stage:
        if made is None:
            stage("load in float64")
            simulator = load(source, dtype=torch.float64)
        else:
            config, options = made
            how: dict[str, Any] = {"dtype": torch.float64, "seed": seed, "check": "none"}
            simulator = compile_model(source, config, progress=stage, **how, **options)
        stage("compare with autograd")
        length = tokens if tokens is not None else min(64, simulator.program.facts.longest or 64)
        result = verify(simulator, tokens=length, seed=seed)
    if as_json:
        console.print_json(result.to_dict())
    else:
        _print(result)
    if not result.agrees:
        worst = max(result.updates, key=lambda update: update.worst)
        raise NumericalError(
            f"{source} disagrees with {result.reference}: initial logits differ by "
            f"{result.initial_logits_error:.1e}, final by "
            f"{result.logits_error:.1e} ({result.updated_logits_error:.1e} under its own updates) "
            "of the largest, "
            f"{worst.name} by {worst.worst:.1e} of its largest weight"
        )


def _print(result: Verification) -> None:
    table = Sheet("layer", "update cosine", "relative error", "not updated")
    for layer in result.layers():
        inside = [update for update in result.updates if update.name.startswith(layer.name + ".")]
        still = [".".join(update.name.split(".")[-2:]) for update in inside if not update.norm]
        cosine = "-" if layer.cosine is None else f"{layer.cosine:.6f}"
        error = "-" if layer.relative_error is None else f"{layer.relative_error:.2e}"
        table.add_row(layer.name, cosine, error, ", ".join(still))
    console.print_table(table)
    verb = "agrees" if result.agrees else "DISAGREES"
    errors = (
        f"initial logits {result.initial_logits_error:.1e}, final logits {result.logits_error:.1e} "
        "of the largest"
    )
    if result.exact:
        console.print_text(f"{verb} with {result.reference} in float64 (exact): {errors}")
    else:
        console.print_text(
            f"the forward passes: {verb} with {result.reference} in float64, the last one under "
            "the simulator's own updates to "
            f"{result.updated_logits_error:.1e}; the updates are approximate by configuration "
            f"(table above): {errors}"
        )
    if result.islands and not result.exact:
        console.print_text(
            f"the gradients of islands are exact: {', '.join(result.islands)}; approximations are "
            "of the operators that passes recognise"
        )
