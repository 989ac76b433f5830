"""Prompts as trees of tokens, so that one call of a model serves many of them.

A branch of a tree sees itself and the branches it grows from, and its positions go on from theirs;
so a tree gives each prompt in it exactly what the prompt alone would give:

    demonstrations ---- prompt 1 ---- all but the last token of a label
                  \\--- prompt 2 ----
                  \\--- domain string

Labels of one token need no branch.

Legend: B sequences, T tokens, K kept positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tintc.evaluate.tasks import Example, Task, Template
from tintc.ir.precision import wide
from tintc.runtime.batch import Batch

Tokens = tuple[int, ...]
# Of each label the positions whose logits are read and the token that is looked up there: log
# p(label) is the sum over them.
Question = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Branch:
    """tokens after those of the branch `parent` of the same tree. targets: indices of the tokens
    that are trained on.
    """

    tokens: Tokens
    parent: int | None = None
    targets: Tokens = ()


@dataclass
class Tree:
    """Branches, each after the one that it grows from, laid side by side in one sequence."""

    branches: list[Branch] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(branch.tokens) for branch in self.branches)

    def add(self, tokens: Tokens, parent: int | None = None, targets: Tokens = ()) -> int:
        """Appends a branch and returns its number. A first token that stands after anything but its
        parent's last is no target: a model predicts it from the token before it in the sequence."""
        follows = parent is not None and parent == len(self.branches) - 1
        self.branches.append(Branch(tokens, parent, tuple(i for i in targets if i > 0 or follows)))
        return len(self.branches) - 1

    def ask(self, branch: int, labels: Sequence[Tokens]) -> Question:
        """Where to read the log-likelihood of each label after a branch; grows branches for labels
        of several tokens.
        """
        last = self.start(branch) + len(self.branches[branch].tokens) - 1
        found = []
        for label in labels:
            places = [last]
            if len(label) > 1:
                start = self.start(self.add(label[:-1], branch))
                places += range(start, start + len(label) - 1)
            found.append(tuple(zip(places, label, strict=True)))
        return tuple(found)

    def start(self, branch: int) -> int:
        """The place of a branch's first token in the sequence."""
        return sum(len(one.tokens) for one in self.branches[:branch])

    def ancestors(self, branch: int) -> set[int]:
        """The branch and those it grows from."""
        found, parent = {branch}, self.branches[branch].parent
        return found if parent is None else found | self.ancestors(parent)


def as_sequences(trees: Sequence[Tree]) -> Batch:
    """One sequence a tree, padded at the right. Trees that are one branch each need no mask of (B,
    T, T).
    """
    if len(trees) == 1 and len(trees[0].branches) == 1:
        ids, train, *_ = _tensors(trees[0], len(trees[0]))
        return Batch(ids[None], train[None])
    parts = [_tensors(tree, max(map(len, trees))) for tree in trees]
    ids_BT, train_BT, positions_BT, allowed_BTT = (
        torch.stack(group) for group in zip(*parts, strict=True)
    )
    return Batch(ids_BT, train_BT, None, allowed_BTT, positions_BT)


def _tensors(tree: Tree, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T) ids, (T) 1 on targets, (T) positions and (T, T) bool who may look at whom; zeros after
    the tree's end.

    The training mask marks targets alone: a position carries loss iff its target is marked, so
    nothing else depends on it.
    """
    ids, train, positions = (torch.zeros(length, dtype=torch.int64) for _ in range(3))
    allowed = torch.zeros(length, length, dtype=torch.bool)
    spans = [
        slice(tree.start(i), tree.start(i) + len(branch.tokens))
        for i, branch in enumerate(tree.branches)
    ]
    for number, (branch, span) in enumerate(zip(tree.branches, spans, strict=True)):
        ids[span] = torch.tensor(branch.tokens)
        train[[span.start + target for target in branch.targets]] = 1
        first = 0 if branch.parent is None else int(positions[spans[branch.parent].stop - 1]) + 1
        positions[span] = torch.arange(first, first + len(branch.tokens))
        for seen in tree.ancestors(number):
            allowed[span, spans[seen]] = True
    return ids, train, positions, allowed.tril()


def places(questions: Sequence[Question]) -> Tensor:
    """(K,): every position that any of the questions reads."""
    return torch.tensor(
        sorted({place for question in questions for label in question for place, _ in label})
    )


def label_scores(
    logits_BKV: Tensor, keep_K: Tensor, questions: Sequence[Sequence[Question]]
) -> list[list[list[float]]]:
    """log p(label) for every label of every question of every sequence, in nats, from the logits at
    the kept positions.
    """
    logits_BKV = wide(logits_BKV)
    norms_BK = logits_BKV.logsumexp(-1)
    column = {int(place): index for index, place in enumerate(keep_K)}
    reads = [
        (row, column[place], token)
        for row, asked in enumerate(questions)
        for question in asked
        for label in question
        for place, token in label
    ]
    rows, columns, tokens = (
        torch.tensor(part, device=logits_BKV.device) for part in zip(*reads, strict=True)
    )
    found = iter((logits_BKV[rows, columns, tokens] - norms_BK[rows, columns]).tolist())
    return [
        [[sum(next(found) for _ in label) for label in question] for question in asked]
        for asked in questions
    ]


class Writer:
    """Writes examples of a task in tokens by a template.

    start: what the tokenizer puts before every text (a BOS token, or nothing). labels: the tokens
    of each label's word, and of the space before it. longest: tokens of the longest context; longer
    texts lose their end.
    """

    def __init__(self, tokenizer: Any, task: Task, template: Template, longest: int) -> None:
        self.tokenizer, self.template, self.longest = tokenizer, template, longest
        self.start: Tokens = tuple(tokenizer("").input_ids)
        self.labels = tuple(self._following(template.answer, f" {word}") for word in template.words)
        self.separator = self._following(f"{template.answer} {template.words[0]}", task.separator)
        self.domain = self._tokens(template.domain)

    def context(self, text: str) -> Tokens:
        """The prompt without a label, without `start`, at most `longest` tokens: the text is cut at
        its end.
        """
        tokens = self._tokens(self.template.context(text))
        while len(tokens) > self.longest and text:
            text = text[: min(len(text) - 1, len(text) * self.longest // len(tokens))].rstrip()
            tokens = self._tokens(self.template.context(text))
        return tokens

    def demonstration(self, example: Example, *, whole: bool) -> tuple[Tokens, Tokens]:
        """Tokens of an example with its label, and the indices of its targets: the label alone, or
        the whole.
        """
        context, label = self.context(example.text), self.labels[example.label]
        return context + label, tuple(
            range(0 if whole else len(context), len(context) + len(label))
        )

    def _tokens(self, text: str) -> Tokens:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _following(self, before: str, text: str) -> Tokens:
        """Tokens of a text in the place where it stands: some tokenizers put a space before any
        text that comes first.
        """
        first, both = self._tokens(before), self._tokens(before + text)
        return (
            both[len(first) :]
            if both[: len(first)] == first and len(both) > len(first)
            else self._tokens(text)
        )
