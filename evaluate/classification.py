"""Text classification: the unmodified model, dynamic evaluation and a simulator, zero-shot and with
demonstrations.

With demonstrations a learner trains on them once and answers every test item; zero-shot it trains
on each item's own text. Labels are scored by log-likelihood, with or without calibration. Template,
calibration, learning rate and budget are chosen on training data alone: the template by the
unmodified model, for all; rate, budget and calibration by each simulator; rate and calibration by
dynamic evaluation, which has the budget of the first simulator. Two controls show where a gain
comes from: gradient ascent, and labels (zero-shot: tokens) that are shuffled before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tintc.evaluate import lessons
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.classification_rows import (
    ROW_DYNAMIC,
    ROW_IN_CONTEXT,
    ROW_UNMODIFIED,
    averages,
    compare,
    plain,
)
from tintc.evaluate.draws import (
    Data,
    balanced,
    divide,
    in_random_order,
    shuffled_tokens,
    with_shuffled_labels,
)
from tintc.evaluate.examples import read_splits
from tintc.evaluate.hub_rows import USUAL, Access
from tintc.evaluate.judgement import Floats, correctness, quality, summary
from tintc.evaluate.lessons import FewShot, Lesson, Scores, ZeroShot, digest
from tintc.evaluate.prompts import Writer
from tintc.evaluate.settings import UNMODIFIED, Form, Method, Settings, method
from tintc.evaluate.store import Store
from tintc.evaluate.tasks import Example, Task, find_task
from tintc.ir.errors import InputError

Progress = Callable[[str, int, int], None]
# Items that a zero-shot learner trains on in one stored unit: an interruption loses no more.
_CHUNK = 50
_CHOICE = 0  # seed of the demonstrations that settings are chosen with
_LONGEST = 256  # tokens of a context
_ZERO_SHOT_CHOOSING = 16  # items that a learner's rate is chosen on where it trains on each


def run(
    auxiliary: Auxiliary,
    settings: Settings,
    store: Store,
    progress: Progress = lambda text, done, total: None,
    access: Access = USUAL,
) -> dict[str, Any]:
    """The whole experiment as a JSON object: results of each task and number of shots, and their
    averages over tasks.

    Units that the store holds are not computed again. progress: called before each unit with what
    it is, and how many of how many are done. access: to the hub's data. Raises InputError for data
    that do not fit, SourceError where there are none, UsageError for settings that do not.
    """
    bench = _Bench(auxiliary, settings, store, progress)
    results = []
    for name in settings.tasks:
        task = find_task(name)
        train, test = read_splits(task, settings.data_dir, access)
        data = divide(train, test, len(task.labels), choose=settings.choosing, limit=settings.limit)
        results += [_Cell(bench, task, data, shots).result() for shots in settings.shots]
    progress("done", bench.total, bench.total)
    return {
        "experiment": "classify",
        "model": auxiliary.identity,
        "settings": plain(settings),
        "results": results,
        "averages": averages(results, settings.shots),
    }


class _Bench:
    """Computes units, or finds them in the store."""

    def __init__(
        self, auxiliary: Auxiliary, settings: Settings, store: Store, progress: Progress
    ) -> None:
        self.auxiliary, self.settings, self.store, self.progress = (
            auxiliary,
            settings,
            store,
            progress,
        )
        self.done = 0
        self.total = len(settings.tasks) * sum(self._units(shots) for shots in settings.shots)

    def _units(self, shots: int) -> int:
        """How many units a task takes: settings tried, then rows and seeds."""
        settings = self.settings
        budgets = settings.budgets_for(shots)
        rates = len(settings.rates_for(shots, budgets[0]))
        tried = 2 + rates * (1 + len(settings.presets) * len(budgets))
        rows = 2 + 3 * len(settings.presets)
        if settings.reads_in_context(shots):
            tried, rows = tried + 1, rows + 1
        return tried + rows * (len(settings.seeds) if shots else 1)

    def scores(self, what: str, parts: Sequence[Lesson], method: Method) -> tuple[Scores, float]:
        """Scores of the items of all parts, and the seconds that they took when they were
        computed.
        """
        self.progress(what, min(self.done, self.total), self.total)
        learner = method.learner(self.auxiliary)
        texts, domains, seconds = [], [], 0.0
        for part in parts:
            unit = {
                "experiment": "classification",
                "method": method.describe(),
                "lesson": digest(part),
            }
            result = self.store.get(unit)
            if result is None:
                started = time.perf_counter()
                answer = part.answer(learner, self.settings.batch).rounded()
                result = self.store.put(
                    unit, {**answer, "seconds": round(time.perf_counter() - started, 3)}
                )
            texts += result["given_text"]
            domains += result["given_domain"]
            seconds += result["seconds"]
        self.done += 1
        return Scores(texts, domains), seconds


@dataclass(frozen=True)
class _Choice:
    """Something to choose for a learner, and its accuracy and mean log-likelihood on the choosing
    items.
    """

    method: Method
    calibrated: bool
    quality: tuple[float, float]


class _Cell:
    """One task with one number of demonstrations. capacity: tokens that demonstrations may have
    together, by form.
    """

    def __init__(self, bench: _Bench, task: Task, data: Data, shots: int) -> None:
        self.bench, self.task, self.data, self.shots = bench, task, data, shots
        self.settings = bench.settings
        facts, tokens = bench.auxiliary.facts, self.settings.tokens
        longest = min(tokens, facts.longest or tokens)
        # Positions restart with each separate demonstration, so that a table of positions does not
        # limit how many there are.
        self.capacity: dict[Form, int] = {
            "sequence": longest,
            "separate": min(tokens, facts.max_tokens or tokens),
        }
        tokenizer = bench.auxiliary.tokenizer
        self.writers = [
            Writer(tokenizer, task, template, min(_LONGEST, longest // 3))
            for template in task.templates
        ]
        self.writer = self.writers[0]

    def result(self) -> dict[str, Any]:
        """Chooses, evaluates and compares."""
        settings = self.settings
        base = self._choose_template()
        rows = [self._row(ROW_UNMODIFIED, base)]
        if settings.reads_in_context(self.shots):
            rows.append(
                self._row(
                    ROW_IN_CONTEXT,
                    self._best(self._try(UNMODIFIED, form="sequence")),
                    form="sequence",
                )
            )
        budgets = settings.budgets_for(self.shots)
        chosen = {
            preset: self._choose_method("simulator", preset, budgets, base)
            for preset in settings.presets
        }
        first = settings.presets[0]
        rows.append(
            self._row(
                ROW_DYNAMIC,
                self._choose_method(ROW_DYNAMIC, first, (chosen[first].method.budget or "",), base),
            )
        )
        rows += [self._row(self._name(preset), choice) for preset, choice in chosen.items()]
        for preset, choice in chosen.items():
            rows += self._controls(self._name(preset), choice)
        compare(rows)
        return {
            "task": self.task.name,
            "title": self.task.title,
            "shots": self.shots,
            "form": settings.form if self.shots else None,
            "loss": settings.loss if self.shots else "own context",
            "template": self.writer.template.name,
            "demonstrations": [
                len(self._demonstrations(seed, settings.form)) for seed in self._seeds
            ],
            "choosing_items": len(self.data.choosing),
            "rows": rows,
        }

    def _controls(self, name: str, choice: _Choice) -> list[dict[str, Any]]:
        """What the simulator's choice gives with the sign of the gradient flipped, and after a
        shuffled lesson.
        """
        up = replace(choice.method, rate=-(choice.method.rate or 0.0))
        shuffled = "labels" if self.shots else "context"
        return [
            self._row(f"{name}, ascent", replace(choice, method=up), control=True),
            self._row(f"{name}, shuffled {shuffled}", choice, control=True, shuffled=True),
        ]

    def _name(self, preset: str) -> str:
        return f"simulator ({preset})" if len(self.settings.presets) > 1 else "simulator"

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.settings.seeds if self.shots else (_CHOICE,)  # nothing is drawn zero-shot

    def _choose_template(self) -> _Choice:
        """The template and calibration of the unmodified model; every learner keeps the
        template.
        """
        tried = []
        for writer in self.writers:
            self.writer = writer
            tried += [(choice, writer) for choice in self._try(UNMODIFIED)]
        best = self._best([choice for choice, _ in tried])
        self.writer = next(writer for choice, writer in tried if choice is best)
        return best

    def _choose_method(
        self, kind: str, preset: str, budgets: Sequence[str], base: _Choice
    ) -> _Choice:
        """Budget, rate and calibration; a tie goes to what was tried first: the earlier budget,
        then the smaller rate. Zero-shot, calibration stays that of the unmodified model: items are
        too few to tell more than rates apart."""
        depth = self.bench.auxiliary.facts.blocks
        methods = [
            method(kind, preset, budget, rate, depth, self.settings.changes)
            for budget in budgets
            for rate in self.settings.rates_for(self.shots, budget)
        ]
        tried = [choice for one in methods for choice in self._try(one)]
        return self._best(
            [choice for choice in tried if self.shots or choice.calibrated == base.calibrated]
        )

    def _best(self, tried: Sequence[_Choice]) -> _Choice:
        return max(tried, key=lambda choice: choice.quality)

    def _try(self, method: Method, form: Form | None = None) -> list[_Choice]:
        """How good a method is on the choosing items, without and with calibration."""
        items = (
            self.data.choosing
            if self.shots or method is UNMODIFIED
            else self.data.choosing[:_ZERO_SHOT_CHOOSING]
        )
        rate = "" if method.rate is None else f"{method.budget} at {method.rate:g}"
        what = f"{self._title}: choosing, {method.kind} {rate}".rstrip()
        scores, _ = self.bench.scores(
            what, self._lessons(items, _CHOICE, method, form=form), method
        )
        labels = [example.label for example in items]
        return [
            _Choice(method, calibrated, quality(scores, labels, calibrated))
            for calibrated in (False, True)
        ]

    @property
    def _title(self) -> str:
        return f"{self.task.name} {self.shots}-shot"

    def _row(
        self,
        name: str,
        choice: _Choice,
        *,
        control: bool = False,
        shuffled: bool = False,
        form: Form | None = None,
    ) -> dict[str, Any]:
        """A row of the table: accuracies on the test items, and with what settings. right: of each
        item, averaged over seeds.
        """
        labels = [example.label for example in self.data.test]
        found: list[Floats] = []
        seconds = 0.0
        for seed in self._seeds:
            what = f"{self._title}: {name}" + (f", seed {seed}" if self.shots else "")
            given = self._lessons(self.data.test, seed, choice.method, shuffled=shuffled, form=form)
            scores, took = self.bench.scores(what, given, choice.method)
            found.append(correctness(scores, labels, choice.calibrated))
            seconds += took
        right_SN = np.stack(found)
        chosen = {name: value for name, value in choice.method.describe().items() if name != "kind"}
        return {
            "name": name,
            "control": control,
            **summary(right_SN),
            **chosen,
            "budget": choice.method.budget,
            "calibrated": choice.calibrated,
            "choosing_accuracy": choice.quality[0],
            "seconds": round(seconds, 3),
            "right": right_SN.mean(0).tolist(),
        }

    def _demonstrations(self, seed: int, form: Form) -> list[Example]:
        """As many as fit, in one sequence beside the longest prompt, in random order."""
        drawn = balanced(self.data.pool, self.shots, self.data.labels, seed)
        beside = (
            self.writer.longest + max(map(len, self.writer.labels)) if form == "sequence" else 0
        )
        fit = lessons.fitting(self.writer, drawn, form, self.capacity[form] - beside)
        if self.shots and not fit:
            raise InputError(
                f"no demonstration of {self.task.name} fits in {self.capacity[form]} tokens beside "
                f"a prompt of {beside}; "
                "expected a model of longer sequences, a larger limit of tokens, or shorter texts"
            )
        return in_random_order(drawn[:fit], seed)

    def _lessons(
        self,
        items: Sequence[Example],
        seed: int,
        method: Method,
        *,
        shuffled: bool = False,
        form: Form | None = None,
    ) -> list[Lesson]:
        """What a method is given to answer the items."""
        texts = [example.text for example in items]
        if self.shots:
            return [self._few_shot(texts, seed, method, shuffled, form or self.settings.form)]
        if method is UNMODIFIED:
            return [FewShot((), (), lessons.prompts(self.writer, texts), self._room())]
        return [
            self._zero_shot(texts[start : start + _CHUNK], shuffled)
            for start in range(0, len(texts), _CHUNK)
        ]

    def _few_shot(
        self, texts: Sequence[str], seed: int, method: Method, shuffled: bool, form: Form
    ) -> Lesson:
        """Shuffled labels are learnt; prompts that follow demonstrations still follow the right
        ones.
        """
        examples = self._demonstrations(seed, form)
        loss = self.settings.loss
        true = lessons.demonstrations(self.writer, examples, form, loss)
        taught = (
            lessons.demonstrations(self.writer, with_shuffled_labels(examples, seed), form, loss)
            if shuffled
            else true
        )
        prefix = true[0][0] if form == "sequence" else ()
        prompts = lessons.prompts(self.writer, texts, after_prefix=bool(prefix))
        return FewShot(
            () if method is UNMODIFIED else taught, prefix, prompts, self._room(len(prefix))
        )

    def _room(self, prefix: int = 0) -> int:
        """Tokens of prompts beside a prefix that the model takes at once."""
        limit = self.bench.auxiliary.facts.max_tokens
        return lessons.PACK if limit is None else min(lessons.PACK, limit - prefix)

    def _zero_shot(self, texts: Sequence[str], shuffled: bool) -> Lesson:
        prompts = lessons.prompts(self.writer, texts)
        taught, fixed = prompts.contexts, max(1, len(self.writer.start))
        if shuffled:
            taught = tuple(
                shuffled_tokens(context, fixed, context_seed(context)) for context in taught
            )
        return ZeroShot(taught, fixed, prompts)


def context_seed(context: Sequence[int]) -> str:
    """An order of an item's tokens that depends on nothing but the item."""
    return " ".join(map(str, context))
