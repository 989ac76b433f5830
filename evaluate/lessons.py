"""What a learner is trained on and asked: demonstrations first and then questions, or each question
by itself.

A lesson is tokens only. Its digest is what results are stored under, so any change of data,
template, or form makes another result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tintc.evaluate.learners import Learner
from tintc.evaluate.prompts import (
    Question,
    Tokens,
    Tree,
    Writer,
    as_sequences,
    label_scores,
    places,
)
from tintc.evaluate.settings import Form, Loss
from tintc.evaluate.tasks import Example
from tintc.runtime.batch import Batch

# tokens of prompts in one call, beside the demonstrations: fixed, so that no setting changes how
# sums are rounded
PACK = 1024


@dataclass(frozen=True)
class Scores:
    """log p(label | prompt) of each label for each item, and log p(label | domain string) under the
    same weights.
    """

    given_text: list[list[float]]
    given_domain: list[list[float]]

    def rounded(self) -> dict[str, Any]:
        """As stored: seven digits, which is what float32 has."""
        return {
            name: [[float(f"{value:.7g}") for value in row] for row in rows]
            for name, rows in asdict(self).items()
        }


@dataclass(frozen=True)
class Prompts:
    """What is asked. contexts: one an item, each with the tokenizer's start where it begins a text.
    domain: likewise.
    """

    contexts: tuple[Tokens, ...]
    labels: tuple[Tokens, ...]
    domain: Tokens


@dataclass(frozen=True)
class FewShot:
    """Trains once, on demonstrations, and answers all prompts.

    demonstrations: (tokens, indices of targets) of sequences that each see only themselves. prefix:
    demonstrations that every prompt follows; empty where prompts see only themselves. room: tokens
    of the prompts that one call answers; always one prompt at least.
    """

    demonstrations: tuple[tuple[Tokens, Tokens], ...]
    prefix: Tokens
    prompts: Prompts
    room: int = PACK

    def answer(self, learner: Learner, batch: int) -> Scores:
        """Scores of all items. batch changes nothing: prompts are packed into sequences of a fixed
        length.
        """
        with learner.trained(self._training()) as predict:
            texts: list[list[float]] = []
            domain: list[float] = []
            for tree, questions, asks_domain in self._packs():
                keep_K = places(questions)
                found = label_scores(predict(as_sequences([tree]), keep_K), keep_K, [questions])[0]
                if asks_domain:
                    domain = found.pop(0)
                texts += found
        return Scores(texts, [domain] * len(texts))

    def _training(self) -> Batch:
        if not self.demonstrations:
            return Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
        tree = Tree()
        for tokens, targets in self.demonstrations:
            tree.add(tokens, None, targets)
        return as_sequences([tree])

    def _packs(self) -> Iterator[tuple[Tree, list[Question], bool]]:
        """Trees of prompts after the prefix, their questions, and whether the first question is
        about the domain string.
        """
        waiting = [self.prompts.domain, *self.prompts.contexts]
        labels = sum(len(label) - 1 for label in self.prompts.labels)
        first = True
        while waiting:
            tree = Tree()
            questions: list[Question] = []
            parent = tree.add(self.prefix) if self.prefix else None
            while waiting and (
                not questions
                or len(tree) - len(self.prefix) + len(waiting[0]) + labels <= self.room
            ):
                questions.append(tree.ask(tree.add(waiting.pop(0), parent), self.prompts.labels))
            yield tree, questions, first
            first = False


@dataclass(frozen=True)
class ZeroShot:
    """Trains on every prompt by itself, and answers that one.

    lessons: what is trained on for each prompt: the prompt itself, or other tokens, which the
    prompt then does not see. fixed: how many of their first tokens are no targets.
    """

    lessons: tuple[Tokens, ...]
    fixed: int
    prompts: Prompts

    def answer(self, learner: Learner, batch: int) -> Scores:
        """Scores of all items, `batch` at a time; prompts of about the same length go together, so
        that little is padding.
        """
        order = sorted(range(len(self.lessons)), key=lambda item: len(self.lessons[item]))
        found: dict[int, tuple[list[float], list[float]]] = {}
        for start in range(0, len(order), batch):
            items = order[start : start + batch]
            rows = [self._tree(item) for item in items]
            keep_K = places([question for _, questions in rows for question in questions])
            logits = learner.logits(as_sequences([tree for tree, _ in rows]), keep_K)
            scores = label_scores(logits, keep_K, [questions for _, questions in rows])
            found |= {
                item: (text, domain) for item, (text, domain) in zip(items, scores, strict=True)
            }
        answers = [found[item] for item in range(len(order))]
        return Scores([text for text, _ in answers], [domain for _, domain in answers])

    def _tree(self, item: int) -> tuple[Tree, list[Question]]:
        lesson, context = self.lessons[item], self.prompts.contexts[item]
        tree = Tree()
        branch = tree.add(lesson, None, tuple(range(self.fixed, len(lesson))))
        if lesson != context:
            branch = tree.add(context)
        text = tree.ask(branch, self.prompts.labels)
        return tree, [text, tree.ask(tree.add(self.prompts.domain), self.prompts.labels)]


Lesson = FewShot | ZeroShot


def digest(lesson: Lesson) -> str:
    """sha256 of everything that a learner is given."""
    return hashlib.sha256(
        json.dumps([type(lesson).__name__, asdict(lesson)], sort_keys=True).encode()
    ).hexdigest()


def prompts(writer: Writer, texts: Sequence[str], *, after_prefix: bool = False) -> Prompts:
    """The prompts of texts. after_prefix: they follow demonstrations, so that no text begins
    there.
    """
    start = () if after_prefix else writer.start
    return Prompts(
        tuple(start + writer.context(text) for text in texts), writer.labels, start + writer.domain
    )


def demonstrations(
    writer: Writer, examples: Sequence[Example], form: Form, loss: Loss
) -> tuple[tuple[Tokens, Tokens], ...]:
    """What is trained on: (tokens, indices of targets) of one sequence of all examples, or of one
    sequence for each.

    Targets are label words, or whole examples; never the tokenizer's start, the very first token or
    a separator.
    """
    written = [writer.demonstration(example, whole=loss == "context") for example in examples]
    if form == "separate":
        return tuple(
            (writer.start + tokens, _shifted(targets, len(writer.start)))
            for tokens, targets in written
        )
    together: Tokens = writer.start
    marked: Tokens = ()
    for tokens, targets in written:
        marked += _shifted(targets, len(together))
        together += tokens + writer.separator
    return ((together, marked),) if written else ()


def fitting(writer: Writer, examples: Sequence[Example], form: Form, room: int) -> int:
    """How many of the first examples have together at most `room` tokens."""
    used, apart = (
        0 if form == "separate" else len(writer.start),
        len(writer.start) if form == "separate" else len(writer.separator),
    )
    for count, example in enumerate(examples):
        used += len(writer.demonstration(example, whole=True)[0]) + apart
        if used > room:
            return count
    return len(examples)


def _shifted(targets: Tokens, by: int) -> Tokens:
    return tuple(target + by for target in targets)
