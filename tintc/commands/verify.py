"""tintc verify: a compiled simulator against torch.autograd, in float64."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from rich.table import Table

from tintc.commands import console
from tintc.compiler.artifact import load
from tintc.compiler.errors import NumericalError
from tintc.compiler.verification import UpdateError, Verification, verify


def run(path: Path, *, tokens: int | None, seed: int, as_json: bool) -> None:
    """Prints how far the updates are from the exact ones. Raises NumericalError on disagreement."""
    with console.stages(2) as stage:
        stage("load in float64")
        simulator = load(path, dtype=torch.float64)
        stage("compare with autograd")
        length = tokens if tokens is not None else min(64, simulator.program.facts.max_positions or 64)
        result = verify(simulator, tokens=length, seed=seed)
    if as_json:
        console.print_json(dataclasses.asdict(result))
    else:
        _print(result)
    if not result.agrees:
        worst = max(result.updates, key=lambda update: update.worst)
        raise NumericalError(
            f"{path} disagrees with {result.reference}: initial logits differ by {result.initial_logits_error:.1e}, final by "
            f"{result.logits_error:.1e} of the largest, {worst.name} by {worst.worst:.1e} of its largest weight"
        )


def _print(result: Verification) -> None:
    table = Table("layer", "update cosine", "relative error", "not updated", box=None, padding=(0, 2, 0, 0))
    for layer, updates in _by_layer(result.updates).items():
        cosines = [u.cosine for u in updates if u.cosine is not None]
        errors = [u.relative_error for u in updates if u.updated and u.relative_error is not None]
        still = [u.name.rsplit(".", 2)[-2] + "." + u.name.rsplit(".", 1)[-1] for u in updates if not u.updated]
        table.add_row(
            layer,
            f"{min(cosines):.6f}" if cosines else "-",
            f"{max(errors):.2e}" if errors else "-",
            ", ".join(still),
        )
    console.out.print(table)
    console.out.print("cosine: the lowest of the layer's parameters; relative error: the highest, of those that are updated")
    verdict = "agrees" if result.agrees else "DISAGREES"
    kind = "exact" if result.exact else "approximate by configuration"
    console.out.print(
        f"{verdict} with {result.reference} in float64 ({kind}): initial logits {result.initial_logits_error:.1e}, "
        f"final logits {result.logits_error:.1e} of the largest"
    )


def _by_layer(updates: list[UpdateError]) -> dict[str, list[UpdateError]]:
    """Parameters grouped by block: the path up to its first number, or the module's own path."""
    groups: dict[str, list[UpdateError]] = {}
    for update in updates:
        block = re.match(r".*?\.\d+(?=\.)", update.name)
        groups.setdefault(block.group() if block else update.name.rpartition(".")[0], []).append(update)
    return groups
