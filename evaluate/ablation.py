"""What does each approximation cost? The paper's first open question, measured in two ways for a
grid of simulators:

- update errors: how far one step's update is from the exact gradient, block by block
  (`update_errors.py`);
- task performance: on sequences whose first half is trained on, the perplexity of the second half,
  at an inner learning rate that is chosen for each variant on other sequences.

A result is stored for each (variant, rate, sequence) and each (variant, sequence) as it comes.
Nothing depends on how many sequences run at once but the last digits, since a product of other
shapes adds in another order.

Legend: C sequences to choose rates on, N sequences to evaluate, T tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tintc.evaluate import choice, losses
from tintc.evaluate.ablation_grid import EXACT, Variant, grid, select
from tintc.evaluate.ablation_rows import Measured, fields_of, row, same_step
from tintc.evaluate.ablation_settings import Options
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.store import Store
from tintc.evaluate.update_errors import (
    Errors,
    ExactGradient,
    exact_gradient,
    total,
    update_errors,
)
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError
from tintc.ir.precision import dtype_name
from tintc.runtime.batch import Batch

Factory = Callable[[torch.dtype], Auxiliary]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings(Options):
    """base: what every variant has where it is no variant (`ablation_grid.grid`). dtype: of all
    weights but those of variants that try another. model, data: what the report says of them; each
    with a name.
    """

    base: SimulatorConfig = field(default_factory=SimulatorConfig)
    dtype: torch.dtype = torch.float32
    model: dict[str, Any] = field(default_factory=lambda: {"name": "model"})
    data: dict[str, Any] = field(default_factory=lambda: {"name": "text"})


def run(
    auxiliary_factory: Factory,
    ids_choose: Tensor,
    ids_evaluate: Tensor,
    settings: Settings,
    store: Store,
    progress: Progress = lambda text, done, total: None,
) -> dict[str, Any]:
    """The table as JSON values, which may be NaN or infinite where a variant diverges.

    A row has `cosine`, `relative_error` and `length` (`update_errors.py`) of all parameters, of
    each of `layers` and of each of `kinds`, and `mean_cosine` and `min_cosine` over blocks;
    `perplexity_before` of the unmodified model in the same float format, `perplexity`, the `change`
    between them in per cent, its standard error over the n sequences (`error`), its `share` of the
    change that `exact` gives, `p_value` of no difference from `exact`, and `seconds` of a sequence
    (the median).

    auxiliary_factory: the same model with weights of a type; called when something is left to
    compute. float64 gives the exact gradients.
    ids_choose: (C, T), ids_evaluate: (N, T) token ids; the first T // 2 tokens are trained on.
    store: has to name the model as shared.
    progress: what runs, units done, and units known of.

    Raises UsageError for an unknown variant, InputError for ids of another shape.
    """
    _check(ids_choose, ids_evaluate, settings)
    return _Ablation(
        auxiliary_factory, ids_choose, ids_evaluate, settings, store, progress
    ).report()


def _check(ids_choose: Tensor, ids_evaluate: Tensor, settings: Settings) -> None:
    for name, ids in (("ids_choose", ids_choose), ("ids_evaluate", ids_evaluate)):
        if ids.ndim != 2 or ids.shape[1] < 4:
            raise InputError(
                f"{name} has shape {tuple(ids.shape)}; expected (sequences, tokens) with at least "
                "4 tokens"
            )
    if not len(ids_evaluate) or (not len(ids_choose) and settings.inner_lr is None):
        raise InputError(
            f"{len(ids_choose)} sequences to choose rates on and {len(ids_evaluate)} to evaluate; "
            "expected at least 1 of each"
        )
    if settings.error_sequences < 0 or settings.batch < 1:
        raise UsageError(
            f"error_sequences is {settings.error_sequences} and batch {settings.batch}; expected "
            "at least 0 and at least 1"
        )


class _Models:
    """One auxiliary model at a time, and of it the simulators of one variant: every simulator holds
    stacked copies of weights.
    """

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._dtype: torch.dtype | None = None
        self._auxiliary: Auxiliary | None = None

    def get(self, dtype: torch.dtype) -> Auxiliary:
        if self._auxiliary is None or dtype != self._dtype:
            self.forget()
            self._auxiliary, self._dtype = self._factory(dtype), dtype
        return self._auxiliary

    def forget_simulators(self) -> None:
        if self._auxiliary is not None:
            self._auxiliary.forget_simulators()
            gc.collect()  # graphs refer to themselves

    def forget(self) -> None:
        if self._auxiliary is not None:
            self._auxiliary = self._dtype = None
            gc.collect()


class _Ablation:
    def __init__(
        self,
        factory: Factory,
        ids_choose: Tensor,
        ids_evaluate: Tensor,
        settings: Settings,
        store: Store,
        progress: Progress,
    ) -> None:
        self._models, self._settings, self._store, self._progress = (
            _Models(factory),
            settings,
            store,
            progress,
        )
        self._choose, self._evaluate = ids_choose.cpu().long(), ids_evaluate.cpu().long()
        self._variants = select(grid(settings.base, settings.dtype), settings.only)
        self._gradients: dict[str, ExactGradient] = {}
        self._unmodified: dict[torch.dtype, list[float]] = {}
        self._done = 0
        types = {variant.dtype for variant in self._variants}
        self._total = len(self._variants) * (len(self._error_ids) + len(ids_evaluate)) + len(
            types
        ) * len(ids_evaluate)

    def report(self) -> dict[str, Any]:
        """Measures type by type, so that each model is loaded once, and `exact` before all others,
        as their rates start from its.
        """
        self._compute_exact_gradients()
        measured: dict[str, Measured] = {}
        types = list(dict.fromkeys(variant.dtype for variant in self._variants))
        for variant in sorted(self._variants, key=lambda variant: types.index(variant.dtype)):
            measured[variant.name] = self._measure(variant, measured.get(EXACT))
            self._models.forget_simulators()
        self._models.forget()
        return {
            "experiment": "ablate",
            "model": self._settings.model,
            "data": {
                **self._settings.data,
                "sequences": len(self._evaluate),
                "choosing_sequences": len(self._choose),
            },
            "settings": self._described(),
            "rows": [
                row(variant, measured[variant.name], self._variants[0], measured[EXACT])
                for variant in self._variants
            ],
        }

    @property
    def _error_ids(self) -> Tensor:
        return self._evaluate[: self._settings.error_sequences]

    def _described(self) -> dict[str, Any]:
        """What the numbers depend on besides model and data."""
        length = self._evaluate.shape[1]
        return {
            "steps": self._settings.base.steps,
            "layers": self._settings.base.layers,
            "rule": self._settings.base.rule,
            "dtype": self._variants[0].type_name,
            "inner_lr": self._settings.inner_lr,
            "error_sequences": len(self._error_ids),
            "tokens": length,
            "trained": length // 2,
        }

    def _measure(self, variant: Variant, exact: Measured | None) -> Measured:
        errors = [self._errors(variant, ids[None]) for ids in self._error_ids]
        inner_lr = self._settings.inner_lr
        if inner_lr is None:
            inner_lr = self._chosen_rate(variant, errors, exact)
        if variant.dtype not in self._unmodified:
            found = self._losses(
                None, variant.dtype, self._evaluate, f"unmodified model in {variant.type_name}"
            )
            self._unmodified[variant.dtype] = losses.values(found)
        config = dataclasses.replace(variant.config, inner_lr=inner_lr)
        after = self._losses(
            config, variant.dtype, self._evaluate, f"{variant.name}: perplexity at {inner_lr:g}"
        )
        seconds = statistics.median(
            result["seconds"] for result in after
        )  # the first call also emits the program
        return Measured(
            errors, inner_lr, self._unmodified[variant.dtype], losses.values(after), seconds
        )

    # --- update errors

    def _errors_unit(self, variant: Variant, ids_1T: Tensor) -> dict[str, Any]:
        return {
            "experiment": "ablate",
            "what": "errors",
            "config": fields_of(_one_step(variant)),
            "dtype": variant.type_name,
            **_sequence(ids_1T),
        }

    def _compute_exact_gradients(self) -> None:
        """Of the sequences that some variant's errors are missing for; then lets go of the float64
        model.
        """
        for ids_1T in self._error_ids.unsqueeze(1):
            if all(
                self._store.get(self._errors_unit(variant, ids_1T)) is not None
                for variant in self._variants
            ):
                continue
            self._progress("exact gradients in float64", self._done, self._total)
            exact = self._models.get(torch.float64).simulator(_one_step(self._variants[0]))
            self._gradients[_digest(ids_1T)] = exact_gradient(exact, ids_1T, ids_1T.shape[1] // 2)
        self._models.forget()

    def _errors(self, variant: Variant, ids_1T: Tensor) -> Errors:
        unit = self._errors_unit(variant, ids_1T)
        result = self._store.get(unit)
        if result is None:
            self._progress(f"{variant.name}: update errors", self._done, self._total)
            simulator = self._models.get(variant.dtype).simulator(_one_step(variant))
            errors = update_errors(
                simulator, self._gradients[_digest(ids_1T)], ids_1T, ids_1T.shape[1] // 2
            )
            result = self._store.put(unit, errors.to_dict())
        self._advance(f"{variant.name}: update errors", 1)
        return Errors.from_dict(result)

    # --- task performance

    def _chosen_rate(self, variant: Variant, errors: list[Errors], exact: Measured | None) -> float:
        """Of the lowest loss on the sequences to choose on; searched from `exact`'s, at which the
        first step has about the right length.
        """

        def loss(rate: float) -> float:
            self._total += len(self._choose)
            config = dataclasses.replace(variant.config, inner_lr=rate)
            return statistics.fmean(
                losses.values(
                    self._losses(
                        config, variant.dtype, self._choose, f"{variant.name}: choosing, {rate:g}"
                    )
                )
            )

        if exact is None:
            return choice.choose_rate(loss)
        length = total(sums for found in errors for sums in found.layers.values()).length
        return choice.choose_rate(loss, start=same_step(exact.inner_lr, length), coarse=not errors)

    def _losses(
        self, config: SimulatorConfig | None, dtype: torch.dtype, ids_BT: Tensor, text: str
    ) -> list[dict[str, Any]]:
        """Of each sequence {"loss": mean of its second half or None, "seconds"}. config: None for
        the unmodified model.
        """
        shared = {
            "experiment": "ablate",
            "what": "loss",
            "config": config and fields_of(config),
            "dtype": dtype_name(dtype),
        }
        units = [{**shared, **_sequence(ids_1T)} for ids_1T in ids_BT.unsqueeze(1)]

        def compute(rows: list[int]) -> list[dict[str, Any]]:
            return self._batch(config, dtype, ids_BT[rows])

        return losses.measured(
            self._store,
            units,
            self._settings.batch,
            compute,
            lambda count: self._advance(text, count),
        )

    def _batch(
        self, config: SimulatorConfig | None, dtype: torch.dtype, ids_BT: Tensor
    ) -> list[dict[str, Any]]:
        auxiliary = self._models.get(dtype)
        learner = auxiliary.unmodified() if config is None else auxiliary.simulated(config)
        trained = torch.arange(ids_BT.shape[1]) < ids_BT.shape[1] // 2
        labels_BT = ids_BT.masked_fill(trained, -100)
        start = time.perf_counter()
        losses_BT = learner.losses(Batch(ids_BT, trained.long().expand_as(ids_BT)), labels_BT)
        seconds = time.perf_counter() - start  # the losses are on the CPU: no device still works
        return losses.results(losses_BT, int((~trained).sum()), seconds)

    def _advance(self, text: str, units: int) -> None:
        self._done += units
        if units:
            self._progress(text, self._done, self._total)


def _one_step(variant: Variant) -> SimulatorConfig:
    """By sgd: update errors are about the gradient, whatever the rule makes of it."""
    return dataclasses.replace(variant.config.by_plain_sgd(), steps=1)


def _digest(ids_1T: Tensor) -> str:
    return hashlib.sha256(np.asarray(ids_1T.cpu(), dtype="<i8").tobytes()).hexdigest()


def _sequence(ids_1T: Tensor) -> dict[str, Any]:
    """Which tokens a unit is about, and how many of them are trained on."""
    return {"sequence": _digest(ids_1T), "trained": ids_1T.shape[1] // 2}
