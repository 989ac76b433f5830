"""Classification tasks: their label words and templates (`data/tasks.toml`), and their examples,
from a directory or from the hub.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tintc.ir.errors import InputError, SourceError, UsageError

Split = Literal["train", "test"]
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


def read_split(task: Task, split: Split, data_dir: Path | None = None) -> list[Example]:
    """The examples of a split, from `data_dir/<name or alias>/<split>.jsonl`, or without a
    directory from the hub.

    Each line is {"text": ..., "label": ...}; `task.json` beside it may hold {"label_names": [...]}:
    as many as the task has labels, and where they are the same words in another order, labels are
    renumbered. Raises InputError, naming file and line, for anything else, SourceError where the
    hub gives nothing.
    """
    return _from_hub(task, split) if data_dir is None else _from_directory(task, split, data_dir)


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


def _from_directory(task: Task, split: Split, data_dir: Path) -> list[Example]:
    names = (task.name, *task.aliases)
    folder = next((data_dir / name for name in names if (data_dir / name).is_dir()), None)
    if folder is None:
        raise InputError(
            f"{data_dir} has no data of the task {task.name}; expected a directory called "
            f"{' or '.join(names)} there"
        )
    numbers = _numbers(task, folder / "task.json")
    path = folder / f"{split}.jsonl"
    lines = _read(path).split(
        "\n"
    )  # str.splitlines would also cut at U+0085 and U+2028, which JSON allows inside a text
    examples = [
        _example(line, f"{path}, line {number}", numbers)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not examples:
        raise InputError(f'{path} is empty; expected one {{"text": ..., "label": ...}} a line')
    return examples


def _numbers(task: Task, path: Path) -> list[int]:
    """The task's number of each label number of the files."""
    count = len(task.labels)
    if not path.exists():
        return list(range(count))
    try:
        names = json.loads(_read(path)).get("label_names")
    except (ValueError, AttributeError):
        raise InputError(f'{path} is no JSON object; expected {{"label_names": [...]}}') from None
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or len(names) != count
    ):
        raise InputError(
            f"{path} has label_names {names!r}; expected {count} names, those of "
            f"{', '.join(task.labels)}"
        )
    own, theirs = [name.lower() for name in task.labels], [name.lower() for name in names]
    return (
        [own.index(name) for name in theirs]
        if sorted(own) == sorted(theirs)
        else list(range(count))
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; expected a text file in UTF-8") from None


def _example(line: str, where: str, numbers: list[int]) -> Example:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(
            f'{where} is no JSON: {error}; expected {{"text": ..., "label": ...}}'
        ) from None
    if not isinstance(entry, dict) or not {"text", "label"} <= set(entry):
        got = (
            f"an object with {', '.join(sorted(entry)) or 'nothing'}"
            if isinstance(entry, dict)
            else f"a {type(entry).__name__}"
        )
        raise InputError(f'{where} is {got}; expected an object with "text" and "label"')
    text, label = entry["text"], entry["label"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where} has the text {text!r}; expected a text that is not empty")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(numbers):
        raise InputError(
            f"{where} has the label {label!r}; expected a whole number from 0 to {len(numbers) - 1}"
        )
    return Example(text.strip(), numbers[label])


def _from_hub(task: Task, split: Split) -> list[Example]:
    from datasets import load_dataset

    hub = task.hub
    name = hub.train if split == "train" else hub.test
    try:
        rows = load_dataset(hub.path, split=name)
    except (
        Exception
    ) as error:  # of the network, the hub, the disk or the data: every library below has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"the dataset {hub.path} ({name}) cannot be loaded: {reason}; expected a network, or "
            "data_dir=DIR with files"
        ) from None
    columns = [list(rows[column]) for column in hub.text]
    texts = (" ".join(part.strip() for part in parts) for parts in zip(*columns, strict=True))
    values = {value: number for number, value in enumerate(hub.values)}
    pairs = [
        (text.strip(), values.get(value))
        for text, value in zip(texts, rows[hub.label], strict=True)
    ]
    found = [Example(text, label) for text, label in pairs if text and label is not None]
    if not found:
        raise SourceError(
            f"the dataset {hub.path} ({name}) holds no label of {', '.join(map(str, hub.values))}; "
            f"expected the task {task.name}"
        )
    return found
