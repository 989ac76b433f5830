"""Which examples are demonstrations, which choose settings, and which are evaluated: seeded,
balanced, disjoint.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tintc.evaluate.tasks import Example
from tintc.ir.errors import InputError

_POOL = 5000  # of a training set from the hub; of millions of reviews no more are ever drawn


@dataclass(frozen=True)
class Data:
    """One task's examples. pool: what demonstrations are drawn from. choosing: what settings are
    chosen on. test: what is reported.

    No text is in two of them.
    """

    pool: tuple[Example, ...]
    choosing: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: int


def divide(
    train: Sequence[Example],
    test: Sequence[Example],
    labels: int,
    *,
    choose: int,
    limit: int | None,
) -> Data:
    """Takes `limit` test items (None: all; at random, in their order) and `choose` balanced
    training items that settings are chosen on.

    A training text that any test item has, or that occurred before, is left out. The division is
    the same for all seeds. Raises InputError where no demonstrations of every label remain.
    """
    kept = (
        range(len(test))
        if limit is None
        else sorted(random.Random("test").sample(range(len(test)), min(limit, len(test))))
    )
    evaluated = tuple(test[index] for index in kept)
    taken = {example.text for example in test}
    unique = {example.text: example for example in train if example.text not in taken}
    shuffled = list(unique.values())
    random.Random("pool").shuffle(shuffled)
    shuffled = shuffled[:_POOL]
    choosing = balanced(shuffled, min(choose, len(shuffled) // 2), labels, "choosing")
    chosen = set(choosing)
    rest = [example for example in shuffled if example not in chosen]
    missing = sorted(set(range(labels)) - {example.label for example in rest})
    if missing or not choosing:
        raise InputError(
            f"{len(shuffled)} training texts that are not among the test texts leave no "
            "demonstration of label "
            f"{', '.join(map(str, missing))} beside {len(choosing)} to choose settings on; "
            "expected more training examples of every label"
        )
    return Data(tuple(rest), tuple(choosing), evaluated, labels)


def balanced(
    examples: Sequence[Example], count: int, labels: int, seed: int | str
) -> list[Example]:
    """Up to `count` examples, drawn so that every beginning of the list has all labels as often as
    possible.

    Rounds of one example of each label, in a random order within the round; a label that runs out
    is passed over.
    """
    generator = random.Random(f"draw {seed}")
    by_label = [
        [example for example in examples if example.label == label] for label in range(labels)
    ]
    for group in by_label:
        generator.shuffle(group)
    found: list[Example] = []
    while len(found) < count and any(by_label):
        turn = [group for group in by_label if group]
        generator.shuffle(turn)
        found += [group.pop() for group in turn]
    return found[:count]


def in_random_order(examples: Sequence[Example], seed: int | str) -> list[Example]:
    """The examples shuffled."""
    found = list(examples)
    random.Random(f"order {seed}").shuffle(found)
    return found


def with_shuffled_labels(examples: Sequence[Example], seed: int | str) -> list[Example]:
    """The same texts and the same labels, put together at random."""
    labels = [example.label for example in examples]
    random.Random(f"labels {seed}").shuffle(labels)
    return [Example(example.text, label) for example, label in zip(examples, labels, strict=True)]


def shuffled_tokens(tokens: Sequence[int], fixed: int, seed: int | str) -> tuple[int, ...]:
    """The tokens in a random order, but for the first `fixed` of them."""
    rest = list(tokens[fixed:])
    random.Random(f"tokens {seed}").shuffle(rest)
    return (*tokens[:fixed], *rest)
