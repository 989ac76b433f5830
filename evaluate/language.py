"""`tintc eval lm`: how well the rest of a sequence is predicted after training on its first part.

For each training fraction: the perplexity on the rest for the unmodified model, for true dynamic
evaluation, for the simulator, and for two controls, the simulator with the gradient's sign flipped
and the simulator trained on the same tokens in random order. Learning rates are chosen on other
text. Paper: section 4.1. Legend: B sequences, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tintc.evaluate import losses
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.choice import choose_rule
from tintc.evaluate.language_settings import Settings
from tintc.evaluate.learners import Learner
from tintc.evaluate.statistics import paired_p_value
from tintc.evaluate.store import Store
from tintc.evaluate.text import Text, draw, pieces, spread, token_ids
from tintc.ir.call_sizes import trained_tokens
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError
from tintc.runtime.batch import Batch

UNMODIFIED, DYNAMIC, SIMULATOR, ASCENT, SHUFFLED = (
    "unmodified model",
    "dynamic evaluation",
    "simulator",
    "simulator, gradient ascent",
    "simulator, shuffled tokens",
)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Piece:
    """One sequence: its tokens, and the seed that drew it, which shuffles the control's tokens."""

    ids_T: Tensor
    seed: int

    @property
    def unit(self) -> dict[str, Any]:
        return {"sequence": hashlib.sha256(self.ids_T.numpy().tobytes()).hexdigest()}


@dataclass(frozen=True)
class Run:
    """Who learns, by which name and config; `shuffled` trains on the tokens of the segment in
    random order.
    """

    name: str
    config: SimulatorConfig | None = None
    shuffled: bool = False

    def at(self, rate: float) -> Run:
        assert self.config is not None
        return self.by(dataclasses.replace(self.config, inner_lr=rate))

    def by(self, config: SimulatorConfig) -> Run:
        return dataclasses.replace(self, config=config)

    def learner(self, auxiliary: Auxiliary) -> Learner:
        if self.config is None:
            return auxiliary.unmodified()
        return (
            auxiliary.dynamic_evaluation(self.config)
            if self.name == DYNAMIC
            else auxiliary.simulated(self.config)
        )

    @property
    def unit(self) -> dict[str, Any]:
        """What the numbers depend on; an ascent is a simulator at a negative rate."""
        if self.config is None:
            return {"learner": UNMODIFIED}
        config = self.config.described()
        if self.name == DYNAMIC:
            kept = ("layers", "steps", "norm_update", "inner_lr", *self.config.rule)
            config = {name: config[name] for name in kept}
        return {"learner": DYNAMIC if self.name == DYNAMIC else SIMULATOR, "config": config}


class Experiment:
    """Losses of pieces under a run, out of the store or computed and stored."""

    def __init__(
        self, auxiliary: Auxiliary, settings: Settings, store: Store, progress: Progress
    ) -> None:
        self.auxiliary, self.settings, self.store, self.progress = (
            auxiliary,
            settings,
            store,
            progress,
        )
        self.done = self.total = 0

    def measure(
        self, run: Run, fraction: float, items: Sequence[Piece], label: str
    ) -> list[dict[str, Any]]:
        """Of each piece {"loss": mean -log p of the untrained tokens or None, "seconds"}."""
        units = [self._unit(run, fraction, item) for item in items]

        def compute(rows: list[int]) -> list[dict[str, Any]]:
            return self._compute(run, fraction, [items[row] for row in rows])

        return losses.measured(
            self.store,
            units,
            self.settings.batch,
            compute,
            lambda count: self._advance(label, count),
        )

    def _unit(self, run: Run, fraction: float, item: Piece) -> dict[str, Any]:
        order = {"shuffled": item.seed} if run.shuffled else {}
        return {
            **run.unit,
            **order,
            **item.unit,
            "trained": self.trained(fraction),
            "experiment": "lm",
        }

    def trained(self, fraction: float) -> int:
        assert self.settings.tokens is not None
        return trained_tokens(self.settings.tokens, fraction)

    def _compute(self, run: Run, fraction: float, items: list[Piece]) -> list[dict[str, Any]]:
        trained = self.trained(fraction)
        make = shuffled_sequences if run.shuffled else plain_sequences
        sequences, labels_BT = make(items, trained)
        learner = run.learner(self.auxiliary)
        start = time.perf_counter()
        losses_BT = learner.losses(sequences, labels_BT)
        return losses.results(losses_BT, len(items[0].ids_T) - trained, time.perf_counter() - start)

    def _advance(self, label: str, count: int) -> None:
        self.done += count
        self.progress(label, self.done, max(self.total, self.done))


def plain_sequences(items: Sequence[Piece], trained: int) -> tuple[Batch, Tensor]:
    """(B, T) sequences that train on their first `trained` tokens, and labels on the others."""
    ids_BT = torch.stack([item.ids_T for item in items])
    train_BT = (torch.arange(ids_BT.shape[1]) < trained).expand_as(ids_BT)
    return Batch(ids_BT, train_BT.long()), ids_BT.masked_fill(train_BT, -100)


def shuffled_sequences(items: Sequence[Piece], trained: int) -> tuple[Batch, Tensor]:
    """The same behind a copy of the first tokens in random order, which alone is trained on and
    which the sequence does not see.
    """
    plain, labels_BT = plain_sequences(items, trained)
    orders = [
        torch.randperm(trained, generator=torch.Generator().manual_seed(item.seed))
        for item in items
    ]
    mixed_BS = torch.stack([item.ids_T[order] for item, order in zip(items, orders, strict=True)])
    batch, tokens = plain.input_ids.shape
    part = torch.cat([torch.zeros(trained), torch.ones(tokens)])
    allowed_BTT = (part[:, None] == part[None, :]).long().expand(batch, -1, -1)
    positions_BT = torch.cat([torch.arange(trained), torch.arange(tokens)]).expand(batch, -1)
    train_BT = (part == 0).long().expand(batch, -1)
    ids_BT = torch.cat([mixed_BS, plain.input_ids], 1)
    return Batch(ids_BT, train_BT, None, allowed_BTT, positions_BT), torch.cat(
        [torch.full_like(mixed_BS, -100), labels_BT], 1
    )


def run(
    auxiliary: Auxiliary,
    text: Text,
    choosing: Text | None,
    settings: Settings,
    store: Store,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """The table as JSON values. choosing: text to choose rates on, by default the first quarter of
    the text, which is then left out.

    A row has `perplexity` exp(mean loss of all untrained tokens), `change` in per cent of the
    unmodified model's, `error` its standard error over sequences, `p_value` of no difference from
    the unmodified model, `share` of dynamic evaluation's gain, `seconds` of a sequence (median).
    Raises InputError for text that is too short, UsageError for settings that the model cannot
    have.
    """
    settings = _with_length(auxiliary, settings)
    evaluated, chosen_on = _split(auxiliary, text, choosing, settings)
    experiment = Experiment(auxiliary, settings, store, progress)
    norm_updates: dict[str, str] = {}
    learners = []
    for preset in settings.presets:
        config = settings.config(preset)
        if config.norm_update not in norm_updates:
            norm_updates[config.norm_update] = preset
            learners.append(Run(DYNAMIC, config))
        learners.append(Run(SIMULATOR, config))
    each = len(learners) + 2 * len(settings.presets) + 1
    rates_tried = 0 if settings.inner_lr is not None else 5 * settings.candidates
    experiment.total = len(settings.fractions) * (
        each * len(evaluated) + len(learners) * rates_tried * len(chosen_on)
    )
    rows: list[dict[str, Any]] = []
    starts: list[dict[SimulatorConfig, float]] = [{} for _ in learners]
    for fraction in settings.fractions:
        before = experiment.measure(
            Run(UNMODIFIED), fraction, evaluated, f"{fraction:g} {UNMODIFIED}"
        )
        rows.append(_row(Run(UNMODIFIED), fraction, evaluated, before, before))
        for index, learner in enumerate(learners):
            chosen = _choose(experiment, learner, fraction, chosen_on, starts[index])
            for control in [chosen] if learner.name == DYNAMIC else [chosen, *_controls(chosen)]:
                found = experiment.measure(
                    control, fraction, evaluated, f"{fraction:g} {control.name}"
                )
                rows.append(_row(control, fraction, evaluated, found, before))
    _add_shares(rows)
    names = {"name": text.name, "sha256": text.sha256}
    other = (
        {}
        if choosing is None
        else {"chosen_on": choosing.name, "chosen_on_sha256": choosing.sha256}
    )
    return {
        "experiment": "lm",
        "model": auxiliary.identity,
        "data": {
            **names,
            **other,
            "sequences": len(evaluated),
            "choosing_sequences": len(chosen_on),
        },
        "settings": dataclasses.asdict(settings),
        "rows": rows,
    }


def _controls(chosen: Run) -> list[Run]:
    assert chosen.config is not None
    return [
        dataclasses.replace(chosen.at(-chosen.config.inner_lr), name=ASCENT),
        dataclasses.replace(chosen, name=SHUFFLED, shuffled=True),
    ]


def _with_length(auxiliary: Auxiliary, settings: Settings) -> Settings:
    settings.check()
    longest = auxiliary.facts.longest
    length = settings.tokens or longest
    if length is None:
        raise UsageError("this model sets no length; expected tokens of a sequence")
    if longest is not None and length > longest:
        raise UsageError(f"tokens is {length}; this model takes {longest}")
    for fraction in settings.fractions:
        trained = trained_tokens(length, fraction)
        if not 2 <= trained < length:
            raise UsageError(
                f"a fraction of {fraction:g} trains on {trained} of {length} tokens; expected at "
                "least 2, and 1 left to predict"
            )
    return dataclasses.replace(settings, tokens=length)


def _split(
    auxiliary: Auxiliary, text: Text, choosing: Text | None, settings: Settings
) -> tuple[list[Piece], list[Piece]]:
    """(evaluated pieces, pieces that rates are chosen on), from different text."""
    assert settings.tokens is not None
    all_PT = pieces(token_ids(auxiliary.tokenizer, text), settings.tokens, text.name)
    if settings.inner_lr is not None:
        choose_PT, rest_PT = all_PT[:0], all_PT
    elif choosing is not None:
        if choosing.sha256 == text.sha256:
            raise InputError(
                f"{choosing.name} is the evaluated text itself; expected other text to choose the "
                "learning rate on"
            )
        choose_PT, rest_PT = (
            pieces(token_ids(auxiliary.tokenizer, choosing), settings.tokens, choosing.name),
            all_PT,
        )
    else:
        first = max(1, len(all_PT) // 4)
        choose_PT, rest_PT = all_PT[:first], all_PT[first:]
    if len(rest_PT) < len(settings.seeds):
        raise InputError(
            f"{text.name} has {len(rest_PT)} sequences of {settings.tokens} tokens to evaluate; "
            "expected at least one for each of "
            f"{len(settings.seeds)} seeds: use a longer text, fewer tokens or fewer seeds"
        )
    drawn = draw(len(rest_PT), settings.limit, settings.seeds)
    chosen_on = [Piece(choose_PT[index], 0) for index in spread(len(choose_PT), settings.choosing)]
    return [Piece(rest_PT[index], seed) for index, seed in sorted(drawn.items())], chosen_on


def _choose(
    experiment: Experiment,
    learner: Run,
    fraction: float,
    chosen_on: list[Piece],
    starts: dict[SimulatorConfig, float],
) -> Run:
    """At the rate, and by those of the rules asked for, of the lowest mean loss; from one fraction
    to the next the search starts where the last one ended.
    """
    settings = experiment.settings
    assert learner.config is not None
    if settings.inner_lr is not None:
        return learner.at(settings.inner_lr)

    def loss(config: SimulatorConfig) -> float:
        found = experiment.measure(
            learner.by(config),
            fraction,
            chosen_on,
            f"{fraction:g} {learner.name}, choosing: {config.inner_lr:g}",
        )
        return statistics.fmean(losses.values(found))

    return learner.by(choose_rule(settings.rules(learner.config), loss, starts))


def _row(
    run: Run,
    fraction: float,
    items: list[Piece],
    results: list[dict[str, Any]],
    before: list[dict[str, Any]],
) -> dict[str, Any]:
    """One line of the table."""
    after, start = losses.values(results), losses.values(before)
    differences = [a - b for a, b in zip(after, start, strict=True)]
    seeds = sorted({item.seed for item in items})
    by_seed = {
        seed: [d for d, item in zip(differences, items, strict=True) if item.seed == seed]
        for seed in seeds
    }
    return {
        "fraction": fraction,
        "learner": run.name,
        "norm_update": None if run.config is None else run.config.norm_update,
        "config": None if run.config is None or run.name == DYNAMIC else run.config.to_dict(),
        "rule": None if run.config is None else run.config.rule,
        "inner_lr": None if run.config is None else run.config.inner_lr,
        "n": len(items),
        "perplexity": losses.perplexity(statistics.fmean(after)),
        **losses.change(differences),
        "change_by_seed": {
            str(seed): losses.change(values)["change"] for seed, values in by_seed.items()
        },
        "p_value": None if run.name == UNMODIFIED else paired_p_value(after, start),
        "seconds": statistics.median(
            result["seconds"] for result in results
        ),  # the first call also emits the program
    }


def _add_shares(rows: list[dict[str, Any]]) -> None:
    """Of each simulator row: its gain as a share of dynamic evaluation's, for the same fraction and
    parameters of norms.
    """
    for row in rows:
        against = [
            r
            for r in rows
            if r["learner"] == DYNAMIC
            and r["fraction"] == row["fraction"]
            and r["norm_update"] == row["norm_update"]
        ]
        row["share"] = (
            row["change"] / against[0]["change"]
            if row["learner"] == SIMULATOR and against and against[0]["change"] < 0
            else None
        )
