"""Rows of the ablation's table, from what was measured."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from tintc.evaluate import choice, losses
from tintc.evaluate.ablation_grid import EXACT, Variant
from tintc.evaluate.statistics import paired_p_value
from tintc.evaluate.update_errors import (
    KINDS,
    OUTSIDE,
    Errors,
    Sums,
    total,
)
from tintc.ir.config import SimulatorConfig


@dataclass
class Measured:
    """errors: one a sequence. before, after: mean losses of the evaluated sequences in the order of
    the ids.
    """

    errors: list[Errors]
    inner_lr: float
    before: list[float]
    after: list[float]
    seconds: float

    @property
    def differences(self) -> list[float]:
        """Logarithm of the perplexity after over that before, of each sequence."""
        return [after - before for before, after in zip(self.before, self.after, strict=True)]


def same_step(inner_lr: float, length: float) -> float:
    """The rate, out of those that `choose_rate` tries, at which updates that are `length` times as
    long make a step of the same length.
    """
    if not (math.isfinite(length) and length > 0 and inner_lr > 0):
        return choice.START
    return choice.rate(round(2 * math.log2(inner_lr / length / choice.START)))


def row(
    variant: Variant, measured: Measured, exact: Variant, reference: Measured
) -> dict[str, Any]:
    """One row of the report. Cosines, relative errors and lengths are means over sequences."""
    fields, change = fields_of(exact.config), losses.change(measured.differences)
    return {
        "variant": variant.name,
        "config": {
            name: value
            for name, value in fields_of(variant.config).items()
            if value != fields[name]
        },
        "dtype": variant.type_name,
        **errors_of(measured.errors),
        "inner_lr": measured.inner_lr,
        "perplexity_before": losses.perplexity(statistics.fmean(measured.before)),
        "perplexity": losses.perplexity(statistics.fmean(measured.after)),
        **change,
        "share": change["change"] / found
        if (found := losses.change(reference.differences)["change"]) < 0
        else None,
        "p_value": None
        if variant.name == EXACT
        else p_value(measured.differences, reference.differences),
        "n": len(measured.after),
        "seconds": measured.seconds,
    }


def p_value(differences: list[float], others: list[float]) -> float:
    return (
        paired_p_value(differences, others)
        if all(map(math.isfinite, differences + others))
        else math.nan
    )


def errors_of(errors: list[Errors]) -> dict[str, Any]:
    """Cosine and relative error of all parameters, of each block and of each kind of parameter; the
    mean and lowest cosine over blocks.
    """
    if not errors:
        return {
            **dict.fromkeys(("cosine", "relative_error", "length", "mean_cosine", "min_cosine")),
            "layers": {},
            "kinds": {},
        }
    whole = averages([total(found.layers.values()) for found in errors])
    layers = {name: averages([found.layers[name] for found in errors]) for name in errors[0].layers}
    kinds = {
        name: averages([found.kinds[name] for found in errors])
        for name in KINDS
        if name in errors[0].kinds
    }
    cosines = [values["cosine"] for name, values in layers.items() if name != OUTSIDE]
    return {
        **whole,
        "mean_cosine": statistics.fmean(cosines),
        "min_cosine": min(cosines),
        "layers": layers,
        "kinds": kinds,
    }


def averages(sums: list[Sums]) -> dict[str, float]:
    return {
        name: statistics.fmean(getattr(found, name) for found in sums)
        for name in ("cosine", "relative_error", "length")
    }


def fields_of(config: SimulatorConfig) -> dict[str, Any]:
    """What a fused simulator's results depend on: every field but the geometry of the prefix."""
    return {
        name: value
        for name, value in config.described().items()
        if name not in ("prefix_tokens", "sim_hidden", "sim_heads")
    }
