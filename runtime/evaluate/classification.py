"""Text classification: the unmodified model, dynamic evaluation and a simulator, zero-shot and with demonstrations.

With demonstrations a learner trains on them once and answers every test item; zero-shot it trains on each item's own text. Labels are
scored by log-likelihood, with or without calibration. Template, calibration, learning rate and budget are chosen on training data alone:
the template by the unmodified model; for each learner the rate at the first budget and then the budget at that rate; calibration with each.
Two controls show where a gain comes from: gradient ascent, and labels (zero-shot: tokens) that are shuffled before they are learnt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tintc.compiler.errors import InputError
from tintc.runtime.evaluate import lessons
from tintc.runtime.evaluate.auxiliary import Auxiliary
from tintc.runtime.evaluate.draws import Data, balanced, divide, in_random_order, shuffled_tokens, with_shuffled_labels
from tintc.runtime.evaluate.judgement import Floats, correctness, quality, summary
from tintc.runtime.evaluate.lessons import FewShot, Lesson, Scores, ZeroShot, digest
from tintc.runtime.evaluate.prompts import Writer
from tintc.runtime.evaluate.settings import UNMODIFIED, Method, Settings, method
from tintc.runtime.evaluate.statistics import paired_p_value
from tintc.runtime.evaluate.store import Store
from tintc.runtime.evaluate.tasks import Example, Task, find_task, read_split

Progress = Callable[[str, int, int], None]
_CHUNK = 50  # items that a zero-shot learner trains on in one stored unit: an interruption loses no more
_CHOICE = 0  # seed of the demonstrations that settings are chosen with
_LONGEST = 256  # tokens of a context


def run(auxiliary: Auxiliary, settings: Settings, store: Store, progress: Progress = lambda text, done, total: None) -> dict[str, Any]:
    """The whole experiment as a JSON object: results of each task and number of shots, and their averages over tasks.

    Units that the store holds are not computed again. progress: called before each unit with what it is, and how many of how many are
    done. Raises InputError for data that do not fit, UsageError for settings that do not.
    """
    bench = _Bench(auxiliary, settings, store, progress)
    results = []
    for name in settings.tasks:
        task = find_task(name)
        train, test = read_split(task, "train", settings.data_dir), read_split(task, "test", settings.data_dir)
        data = divide(train, test, len(task.labels), choose=settings.choose, limit=settings.limit)
        results += [_Cell(bench, task, data, shots).result() for shots in settings.shots]
    progress("done", bench.total, bench.total)
    return {"model": auxiliary.identity, "settings": _plain(settings), "results": results, "averages": _averages(results, settings.shots)}


class _Bench:
    """Computes units, or finds them in the store."""

    def __init__(self, auxiliary: Auxiliary, settings: Settings, store: Store, progress: Progress) -> None:
        self.auxiliary, self.settings, self.store, self.progress = auxiliary, settings, store, progress
        self.done = 0
        self.total = len(settings.tasks) * sum(self._units(shots) for shots in settings.shots)

    def _units(self, shots: int) -> int:
        """How many units a task takes: settings tried, then rows and seeds."""
        settings = self.settings
        learners = 1 + len(settings.presets)
        tried = 2 + learners * (len(settings.rates_for(shots)) + len(settings.budgets) - 1)
        rows = 1 + learners + 2 * len(settings.presets)
        return tried + rows * (len(settings.seeds) if shots else 1)

    def scores(self, what: str, parts: Sequence[Lesson], method: Method) -> tuple[Scores, float]:
        """Scores of the items of all parts, and the seconds that they took when they were computed."""
        self.progress(what, min(self.done, self.total), self.total)
        learner = method.learner(self.auxiliary)
        texts, domains, seconds = [], [], 0.0
        for part in parts:
            unit = {"experiment": "classification", "method": method.describe(), "lesson": digest(part)}
            result = self.store.get(unit)
            if result is None:
                started = time.perf_counter()
                answer = part.answer(learner, self.settings.batch).rounded()
                result = self.store.put(unit, {**answer, "seconds": round(time.perf_counter() - started, 3)})
            texts += result["given_text"]
            domains += result["given_domain"]
            seconds += result["seconds"]
        self.done += 1
        return Scores(texts, domains), seconds


@dataclass(frozen=True)
class _Choice:
    """What was chosen for a learner, and its accuracy on the choosing items."""

    method: Method
    calibrated: bool
    accuracy: float


class _Cell:
    """One task with one number of demonstrations."""

    def __init__(self, bench: _Bench, task: Task, data: Data, shots: int) -> None:
        self.bench, self.task, self.data, self.shots = bench, task, data, shots
        self.settings = bench.settings
        facts, tokens = bench.auxiliary.facts, self.settings.tokens
        longest = min(tokens, facts.longest or tokens)
        # Positions restart with each demonstration, so that the table of positions does not limit how many there are.
        self.capacity = min(tokens, facts.max_tokens or tokens) if self.settings.form == "separate" else longest
        tokenizer = bench.auxiliary.tokenizer
        self.writers = [Writer(tokenizer, task, template, min(_LONGEST, longest // 3)) for template in task.templates]
        self.writer = self.writers[0]

    def result(self) -> dict[str, Any]:
        """Chooses, evaluates and compares."""
        base = self._choose_template()
        depth = self.bench.auxiliary.facts.blocks
        settings = self.settings
        families = [("dynamic evaluation", settings.presets[0]), *(("simulator", preset) for preset in settings.presets)]
        choices = {family: self._choose_method(*family, depth) for family in families}
        rows = [self._row("unmodified", base)]
        rows += [self._row(self._name(*family), choice) for family, choice in choices.items()]
        for preset in settings.presets:
            chosen = choices["simulator", preset]
            up = Method(**{**asdict(chosen.method), "rate": -(chosen.method.rate or 0.0)})
            name = self._name("simulator", preset)
            rows.append(self._row(f"{name}, ascent", _Choice(up, chosen.calibrated, chosen.accuracy), control=True))
            shuffled = "labels" if self.shots else "context"
            rows.append(self._row(f"{name}, shuffled {shuffled}", chosen, control=True, shuffled=True))
        first, second = (row["right"] for row in rows[:2])
        for row in rows:
            row["p_unmodified"] = None if row is rows[0] else paired_p_value(row["right"], first)
            row["p_dynamic_evaluation"] = None if row in rows[:2] else paired_p_value(row["right"], second)
        return {
            "task": self.task.name,
            "title": self.task.title,
            "shots": self.shots,
            "form": settings.form if self.shots else None,
            "loss": settings.loss if self.shots else "own context",
            "template": self.writer.template.name,
            "demonstrations": [len(self._demonstrations(seed)) for seed in self._seeds],
            "choosing_items": len(self.data.choosing),
            "rows": rows,
        }

    def _name(self, kind: str, preset: str) -> str:
        return f"{kind} ({preset})" if kind == "simulator" and len(self.settings.presets) > 1 else kind

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.settings.seeds if self.shots else (_CHOICE,)  # nothing is drawn zero-shot

    def _choose_template(self) -> _Choice:
        """The template and calibration of the unmodified model; every learner keeps the template."""
        tried = []
        for writer in self.writers:
            self.writer = writer
            tried += [(choice, key, writer) for choice, key in self._try(UNMODIFIED)]
        choice, _, self.writer = max(tried, key=lambda found: found[1])
        return choice

    def _choose_method(self, kind: str, preset: str, depth: int) -> _Choice:
        """The rate at the first budget, then the budget at that rate; a tie goes to the smaller rate and the earlier budget."""
        settings = self.settings
        tried = []
        for rate in settings.rates_for(self.shots):
            tried += self._try(method(kind, preset, settings.budgets[0], rate, depth))
        best = max(tried, key=lambda found: found[1])[0].method.rate
        for budget in settings.budgets[1:]:
            tried += self._try(method(kind, preset, budget, best or 0.0, depth))
        return max(tried, key=lambda found: found[1])[0]

    def _try(self, method: Method) -> list[tuple[_Choice, tuple[float, float]]]:
        """How good a method is on the choosing items, without and with calibration."""
        what = f"{self._title}: choosing, {method.kind} {'' if method.rate is None else f'{method.budget} at {method.rate:g}'}".rstrip()
        scores, _ = self.bench.scores(what, self._lessons(self.data.choosing, _CHOICE, method), method)
        labels = [example.label for example in self.data.choosing]
        found = []
        for calibrated in (False, True):
            key = quality(scores, labels, calibrated)
            found.append((_Choice(method, calibrated, key[0]), key))
        return found

    @property
    def _title(self) -> str:
        return f"{self.task.name} {self.shots}-shot"

    def _row(self, name: str, choice: _Choice, *, control: bool = False, shuffled: bool = False) -> dict[str, Any]:
        """A row of the table: accuracies on the test items, and with what settings. right: of each item, averaged over seeds."""
        labels = [example.label for example in self.data.test]
        found: list[Floats] = []
        seconds = 0.0
        for seed in self._seeds:
            what = f"{self._title}: {name}" + (f", seed {seed}" if self.shots else "")
            scores, took = self.bench.scores(what, self._lessons(self.data.test, seed, choice.method, shuffled=shuffled), choice.method)
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
            "choosing_accuracy": choice.accuracy,
            "seconds": round(seconds, 3),
            "right": right_SN.mean(0).tolist(),
        }

    def _demonstrations(self, seed: int) -> list[Example]:
        """As many as fit beside the longest prompt, in random order."""
        drawn = balanced(self.data.pool, self.shots, self.data.labels, seed)
        room = self.capacity
        if self.settings.form == "sequence":
            room -= self.writer.longest + max(map(len, self.writer.labels))
        fit = lessons.fitting(self.writer, drawn, self.settings.form, room)
        if self.shots and not fit:
            raise InputError(
                f"no demonstration of {self.task.name} fits in {self.capacity} tokens beside a prompt of up to {self.writer.longest}; "
                "expected a model of longer sequences, a larger limit of tokens, or separate demonstrations"
            )
        return in_random_order(drawn[:fit], seed)

    def _lessons(self, items: Sequence[Example], seed: int, method: Method, *, shuffled: bool = False) -> list[Lesson]:
        """What a method is given to answer the items."""
        texts = [example.text for example in items]
        if self.shots:
            return [self._few_shot(texts, seed, method, shuffled)]
        if method is UNMODIFIED:
            return [FewShot((), (), lessons.prompts(self.writer, texts), self._room())]
        return [self._zero_shot(texts[start : start + _CHUNK], shuffled) for start in range(0, len(texts), _CHUNK)]

    def _few_shot(self, texts: Sequence[str], seed: int, method: Method, shuffled: bool) -> Lesson:
        """Shuffled labels are learnt; prompts that follow demonstrations still follow the right ones."""
        form, loss = self.settings.form, self.settings.loss
        examples = self._demonstrations(seed)
        true = lessons.demonstrations(self.writer, examples, form, loss)
        taught = lessons.demonstrations(self.writer, with_shuffled_labels(examples, seed), form, loss) if shuffled else true
        prefix = true[0][0] if form == "sequence" else ()
        prompts = lessons.prompts(self.writer, texts, after_prefix=bool(prefix))
        return FewShot(() if method is UNMODIFIED else taught, prefix, prompts, self._room(len(prefix)))

    def _room(self, prefix: int = 0) -> int:
        """Tokens of prompts beside a prefix that the model takes at once."""
        limit = self.bench.auxiliary.facts.max_tokens
        return lessons.PACK if limit is None else min(lessons.PACK, limit - prefix)

    def _zero_shot(self, texts: Sequence[str], shuffled: bool) -> Lesson:
        prompts = lessons.prompts(self.writer, texts)
        taught, fixed = prompts.contexts, max(1, len(self.writer.start))
        if shuffled:
            taught = tuple(shuffled_tokens(context, fixed, context_seed(context)) for context in taught)
        return ZeroShot(taught, fixed, prompts)


def context_seed(context: Sequence[int]) -> str:
    """An order of an item's tokens that depends on nothing but the item."""
    return " ".join(map(str, context))


def _averages(results: list[dict[str, Any]], shots: Sequence[int]) -> list[dict[str, Any]]:
    """Of each row over all tasks: the mean accuracy, and the paired test over the items of all tasks together."""
    found = []
    for count in shots:
        cells = [result for result in results if result["shots"] == count]
        for index, row in enumerate(cells[0]["rows"]):
            rows = [cell["rows"][index] for cell in cells]
            right = [value for row in rows for value in row["right"]]
            before = [[value for cell in cells for value in cell["rows"][base]["right"]] for base in (0, 1)]
            found.append(
                {
                    "shots": count,
                    "name": row["name"],
                    "accuracy": sum(row["accuracy"] for row in rows) / len(rows),
                    "tasks": len(rows),
                    "n": len(right),
                    "p_unmodified": None if index == 0 else paired_p_value(right, before[0]),
                    "p_dynamic_evaluation": None if index < 2 else paired_p_value(right, before[1]),
                    "seconds": round(sum(row["seconds"] for row in rows), 3),
                }
            )
    return found


def _plain(settings: Settings) -> dict[str, Any]:
    """JSON values, without what changes no result."""
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    return {name: value for name, value in found.items() if name not in ("batch", "data_dir")}
