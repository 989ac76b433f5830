"""`tintc eval lm --protocol stream`: how well long texts are predicted, each chunk before it is
trained on.

For documents of a text: the unmodified model, the simulator, true dynamic evaluation, and two
controls, all in the same windows. Rates are chosen on other documents. TINT.md section 8.
Legend: B documents side by side, N tokens of one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tintc.evaluate import losses
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.choice import choose_rule
from tintc.evaluate.language import (
    ASCENT,
    DYNAMIC,
    SHUFFLED,
    SIMULATOR,
    UNMODIFIED,
    Progress,
    Run,
)
from tintc.evaluate.store import Store
from tintc.evaluate.stream_documents import Passage, longest, share_out
from tintc.evaluate.stream_learners import ShuffledStream, autograd_stream
from tintc.evaluate.stream_rows import Measured, rows_of
from tintc.evaluate.stream_settings import Settings
from tintc.evaluate.text import Text
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError
from tintc.runtime.scoring import read_documents
from tintc.runtime.streaming import Stream, StreamOverflow, StreamScores

Result = dict[str, Any]


class Experiment:
    """Losses of passages under a run, out of the store or computed and stored, one at a time.

    A result is {"losses": summed over the targets of each chunk, "seconds"}, and where losses were
    not finite "overflow", the number of that chunk, behind the last one in "losses".
    """

    def __init__(
        self, auxiliary: Auxiliary, settings: Settings, store: Store, progress: Progress
    ) -> None:
        self.auxiliary, self.settings, self.store = auxiliary, settings, store
        self.progress, self.done, self.total = progress, 0, 0
        self.cut = settings.cut

    def measure(self, run: Run, passages: Sequence[Passage], label: str) -> list[Result]:
        """The result of each passage."""
        never = self.cut.reset == "never"

        def compute(rows: list[int]) -> Iterator[Result]:
            # weights and state of a row depend on all that was read before
            found = self._compute(run, passages if never else [passages[row] for row in rows])
            for number, result in enumerate(found):
                if not never or number in rows:
                    yield result

        return losses.measured(
            self.store,
            [self._unit(run, passages, index) for index in range(len(passages))],
            len(passages) if never else self.settings.batch,
            compute,
            lambda count: self._advance(label, count),
        )

    def _unit(self, run: Run, passages: Sequence[Passage], index: int) -> dict[str, Any]:
        earlier = range(index % self.settings.batch, index, self.settings.batch)
        after = [passages[number].sha256 for number in earlier]
        return {
            **run.unit,
            **({"shuffled": True} if run.shuffled else {}),
            **({"after": after} if self.cut.reset == "never" else {}),
            "document": passages[index].sha256,
            "stream": dataclasses.asdict(self.cut),
            "experiment": "stream",
        }

    def _compute(self, run: Run, passages: Sequence[Passage]) -> Iterator[Result]:
        """In the order of the passages, each as soon as it and all before it are read."""
        width = min(self.settings.batch, len(passages))
        queues = [list(range(row, len(passages), width)) for row in range(width)]
        # autograd has one set of weights
        parts = [[queue] for queue in queues] if run.name == DYNAMIC else [queues]
        found: dict[int, Result] = {}
        following = 0
        for part in parts:
            for index, result in self._read(run, passages, part):
                found[index] = result
                while following in found:
                    yield found[following]
                    following += 1

    def _read(
        self, run: Run, passages: Sequence[Passage], queues: list[list[int]]
    ) -> Iterator[tuple[int, Result]]:
        """Passages by their indices, one queue a row. Where a row's losses are not finite, the
        others are read anew without it.
        """
        while queues:
            order = [q[k] for k in range(len(queues[0])) for q in queues if k < len(q)]
            ledger = _Ledger(passages, queues)
            with self._stream(run, len(queues)) as stream:
                documents = [passages[index].ids_N for index in order]
                try:
                    for document in read_documents(stream, documents, progress=ledger):
                        yield order[document.number], ledger.result(order[document.number])
                    return
                except StreamOverflow as error:
                    row = error.row
            for index in ledger.unread[row]:
                yield index, {**ledger.result(index), "overflow": len(ledger.sums[index])}
            finished = [index for index in order if ledger.is_read(index)]
            left = [queue for number, queue in enumerate(queues) if number != row]
            keep = self.cut.reset == "never"
            queues = [
                rest for queue in left if (rest := [i for i in queue if keep or i not in finished])
            ]

    @contextmanager
    def _stream(self, run: Run, rows: int) -> Iterator[Stream]:
        auxiliary, cut = self.auxiliary, self.cut
        if run.config is None:
            yield Stream(auxiliary.unmodified().simulator, rows, cut, learns=False)
        elif run.name == DYNAMIC:
            learner = auxiliary.dynamic_evaluation(run.config)
            with autograd_stream(learner.simulator, cut, learner.rule) as stream:
                yield stream
        else:
            kind = ShuffledStream if run.shuffled else Stream
            yield kind(auxiliary.simulated(run.config).at_rate(), rows, cut)

    def _advance(self, label: str, count: int) -> None:
        self.done += count
        self.progress(label, self.done, max(self.total, self.done))


class _Ledger:
    """Sums of the losses of each chunk, as they come. unread: of each row, passages that it is not
    done with.
    """

    def __init__(self, passages: Sequence[Passage], queues: list[list[int]]) -> None:
        self.unread = [list(queue) for queue in queues]
        self.sums: dict[int, list[float]] = {index: [] for queue in queues for index in queue}
        self._left = {index: passages[index].targets for index in self.sums}
        self._seconds = dict.fromkeys(self.sums, 0.0)
        self._last = time.perf_counter()

    def __call__(self, chunk: int, scores: StreamScores) -> None:
        now = time.perf_counter()
        reading = [queue for queue in self.unread if queue]
        for row, queue in enumerate(self.unread):
            if not queue:
                continue
            found = scores.losses[row][~scores.losses[row].isnan()].double()
            self.sums[queue[0]].append(losses.rounded(float(found.sum())))
            self._left[queue[0]] -= len(found)
            self._seconds[queue[0]] += (now - self._last) / len(reading)
            if self.is_read(queue[0]):
                queue.pop(0)
        self._last = now

    def is_read(self, index: int) -> bool:
        return self._left[index] == 0

    def result(self, index: int) -> Result:
        return {"losses": self.sums[index], "seconds": round(self._seconds[index], 4)}


def run(
    auxiliary: Auxiliary,
    text: Text,
    choosing: Text | None,
    settings: Settings,
    store: Store,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """The table as JSON values; rows as `stream_rows.rows_of` makes them. choosing: text to choose
    rates on, by default the first quarter of the documents, which are then left out.

    Raises InputError for documents without a target, UsageError for settings that the model cannot
    have, NumericalError where losses of a learner are not finite, which names document and chunk;
    results so far are kept in the store.
    """
    settings.check()
    chooses = settings.inner_lr is None
    experiment = Experiment(auxiliary, settings, store, progress)
    experiment.cut.check(auxiliary.facts.longest)
    evaluated, other = share_out(text, choosing, chooses)
    tokens = settings.choosing_tokens or settings.tokens
    passages = longest(auxiliary.tokenizer, evaluated, settings.limit, settings.tokens)
    chosen_on = longest(auxiliary.tokenizer, other, settings.choosing, tokens)
    learners = _learners(settings)
    controlled = [label for label, each in learners if _has_controls(each, settings)]
    experiment.total = len(passages) * (1 + len(learners) + 2 * len(controlled))
    plain = Run(UNMODIFIED)
    measured = [Measured(UNMODIFIED, plain, experiment.measure(plain, passages, UNMODIFIED))]
    controls: list[tuple[str, Run]] = []
    for label, learner in learners:
        found = _choose(experiment, learner, label, chosen_on)
        measured.append(_finite(experiment, found, label, passages))
        if label in controlled:
            controls += controls_of(label, found)
    for label, control in controls:
        measured.append(Measured(label, control, experiment.measure(control, passages, label)))
    return {
        "experiment": "stream",
        "model": auxiliary.identity,
        "data": {
            "name": text.name,
            "sha256": text.sha256,
            "documents": [passage.described() for passage in passages],
            "first_token_counts": not any(passage.first_is_text for passage in passages),
            **({} if choosing is None else {"chosen_on": choosing.name}),
            **({} if choosing is None else {"chosen_on_sha256": choosing.sha256}),
            "choosing_documents": [passage.described() for passage in chosen_on],
        },
        "settings": dataclasses.asdict(settings),
        "rows": rows_of(measured, passages, settings),
    }


def _learners(settings: Settings) -> list[tuple[str, Run]]:
    """Simulators of every preset and variant, then dynamic evaluation by the config's own rule,
    once for each kind of parameters that are trained; with what they are called.
    """
    configs = {preset: settings.config(preset) for preset in settings.presets}
    first = settings.presets[0]
    variants = {f"{first}, {name}": settings.variant(name) for name in settings.variants}
    found = [
        (f"{SIMULATOR} ({name})", Run(SIMULATOR, config))
        for name, config in {**configs, **variants}.items()
    ]
    by_norms = {None if each.train else each.norm_update: each for each in configs.values()}
    for kind, config in by_norms.items():
        norms = {"all": " (all of norms)", "bias": " (shifts of norms)"} if kind else {}
        several = norms if len(by_norms) > 1 else {}
        found.append((DYNAMIC + several.get(str(kind), ""), Run(DYNAMIC, config)))
    return found


def _has_controls(run: Run, settings: Settings) -> bool:
    """Simulators by the config's own rule."""
    configs = [settings.config(preset) for preset in settings.presets]
    return settings.controls and run.name == SIMULATOR and run.config in configs


def controls_of(label: str, chosen: Run) -> list[tuple[str, Run]]:
    """Gradient ascent at the same rate, and the same on shuffled tokens."""
    assert chosen.config is not None
    ascent = dataclasses.replace(chosen.at(-chosen.config.inner_lr), name=ASCENT)
    shuffled = dataclasses.replace(chosen, name=SHUFFLED, shuffled=True)
    return [(each.name.replace(SIMULATOR, label), each) for each in (ascent, shuffled)]


def _choose(experiment: Experiment, learner: Run, name: str, chosen_on: list[Passage]) -> Run:
    """At the rate, and by those of the rules asked for, of the lowest loss a token."""
    settings = experiment.settings
    assert learner.config is not None
    if settings.inner_lr is not None:
        return learner.at(settings.inner_lr)

    def loss(config: SimulatorConfig) -> float:
        label = f"{name}, choosing: {config.inner_lr:g}"
        found = experiment.measure(learner.by(config), chosen_on, label)
        if any("overflow" in result for result in found):
            return math.inf
        total = math.fsum(value for result in found for value in result["losses"])
        return total / sum(passage.targets for passage in chosen_on)

    return learner.by(choose_rule(settings.rules(learner.config), loss, {}, settings.rates))


def _finite(experiment: Experiment, run: Run, label: str, passages: list[Passage]) -> Measured:
    """A learner's results. Raises NumericalError at the first document whose losses are not finite,
    and reads no other then.
    """
    never = experiment.cut.reset == "never"
    size = len(passages) if never else experiment.settings.batch
    results: list[Result] = []
    for start in range(0, len(passages), size):
        group = passages[start : start + size]
        results += experiment.measure(run, group, label)
        for passage, result in zip(group, results[start:], strict=True):
            if "overflow" in result:
                assert run.config is not None
                raise NumericalError(
                    f"{label} at inner_lr {run.config.inner_lr:g}: the losses of {passage.name} "
                    f"are not finite in chunk {result['overflow']}: the weights diverged in an "
                    "earlier chunk; lower inner_lr, or limit updates (clip_norm, max_drift)"
                )
    return Measured(label, run, results)
