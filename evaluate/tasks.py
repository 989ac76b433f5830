"""Classification tasks: their label words and templates (`data/tasks.toml`)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tintc.ir.errors import UsageError

_PLACE = "{text}"


@dataclass(frozen=True)
class Template:
    """How an example is written: `text` with its text in place of {text}, `answer`, a space and the
    word of its label.

    domain: what stands in place of text and answer where the labels are asked for without a text.
    """

    name: str
    text: str
    answer: str
    words: tuple[str, ...]
    domain: str

    def context(self, text: str) -> str:
        """The prompt up to the label's word, without the space before it."""
        return self.text.replace(_PLACE, text) + self.answer


@dataclass(frozen=True)
class Hub:
    """Where a dataset lies on the hub. values: of the label column, in the order of the task's
    labels.
    """

    path: str
    train: str
    test: str
    text: tuple[str, ...]
    label: str
    values: tuple[int | str, ...]


@dataclass(frozen=True)
class Task:
    """A classification task. aliases: other names that it is known by. labels: names of the
    classes, in the order of their numbers.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    labels: tuple[str, ...]
    separator: str
    hub: Hub
    templates: tuple[Template, ...]


@dataclass(frozen=True)
class Example:
    """A text and the number of its label."""

    text: str
    label: int


def load_tasks() -> dict[str, Task]:
    """All tasks by name, in the order of `data/tasks.toml`."""
    text = (resources.files("tintc") / "data" / "tasks.toml").read_text(encoding="utf-8")
    return {name: _task(name, entry) for name, entry in tomllib.loads(text).items()}


def find_task(name: str) -> Task:
    """The task of a name or an alias. Raises UsageError, which lists all, for an unknown one."""
    tasks = load_tasks()
    for task in tasks.values():
        if name.lower() in (task.name, *task.aliases):
            return task
    raise UsageError(f"unknown task {name!r}; expected one of {', '.join(tasks)}")


def _task(name: str, entry: dict[str, Any]) -> Task:
    hub: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in entry["hub"].items()
    }
    templates = tuple(
        Template(**{**template, "words": tuple(template["words"])})
        for template in entry["templates"]
    )
    labels = tuple(entry["labels"])
    assert all(
        len(template.words) == len(labels) and _PLACE in template.text for template in templates
    ), name
    return Task(
        name,
        entry["title"],
        tuple(entry["aliases"]),
        labels,
        entry["separator"],
        Hub(**hub),
        templates,
    )
