"""Examples of a classification task, from a directory or from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from tintc.evaluate.hub_rows import USUAL, Access, HubSplit
from tintc.evaluate.tasks import Example, Task
from tintc.ir.errors import InputError, SourceError

Split = Literal["train", "test"]


def read_split(
    task: Task,
    split: Split,
    data_dir: Path | None = None,
    access: Access = USUAL,
) -> list[Example]:
    """The examples of a split, from `data_dir/<name or alias>/<split>.jsonl`, or without a
    directory from the hub.

    Each line is {"text": ..., "label": ...}; `task.json` beside it may hold {"label_names": [...]}:
    as many as the task has labels, and where they are the same words in another order, labels are
    renumbered. Raises InputError, naming file and line, for anything else, SourceError where the
    hub gives nothing.
    """
    if data_dir is not None:
        return _from_directory(task, split, data_dir)
    return _from_hub(task, split, access)


def read_splits(
    task: Task, data_dir: Path | None = None, access: Access = USUAL
) -> tuple[list[Example], list[Example]]:
    """The examples to train and choose on, and those to test."""
    return (
        read_split(task, "train", data_dir, access),
        read_split(task, "test", data_dir, access),
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


def _from_hub(task: Task, split: Split, access: Access) -> list[Example]:
    hub = task.hub
    name = hub.train if split == "train" else hub.test
    found = HubSplit(hub.path, name, "--data-dir with files")
    *columns, labels = found.columns([*hub.text, hub.label], access)
    texts = (" ".join(part.strip() for part in parts) for parts in zip(*columns, strict=True))
    values = {value: number for number, value in enumerate(hub.values)}
    pairs = [(text.strip(), values.get(value)) for text, value in zip(texts, labels, strict=True)]
    examples = [Example(text, label) for text, label in pairs if text and label is not None]
    if not examples:
        raise SourceError(
            f"the dataset {hub.path} ({name}) holds no label of {', '.join(map(str, hub.values))}; "
            f"expected the task {task.name}"
        )
    return examples
