"""tintc run --each: a context and a prompt in each line of a file, a continuation in each line of
what is printed, in the same order.

    {"id": ..., "context": "trained on", "prompt": "continued under what was learned"}

All lines are read and made tokens of before anything is computed. A context that several lines
share is trained on once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tintc.commands import console
from tintc.commands.continuing import (
    Continued,
    Continuing,
    Diverged,
    adapt_to,
    contexts_at_once,
    prompt_of,
)
from tintc.commands.generating import Generating
from tintc.commands.loaded import load_at_rate, tokenizing
from tintc.commands.prompt import Prompt
from tintc.commands.text import Reading
from tintc.ir.errors import InputError, NumericalError
from tintc.runtime.simulator import Simulator

_FIELDS = ("context", "prompt")


@dataclass(frozen=True)
class Line:
    """number: in the file, from 1. about: its id, if it has one. context, prompt: tokens."""

    number: int
    about: dict[str, Any]
    context: tuple[int, ...]
    prompt: list[int]


def run(
    path: Path,
    asked: Reading,
    generating: Generating,
    batch: int,
    device: str | None,
    dtype: torch.dtype | None,
    *,
    as_json: bool,
) -> None:
    """batch: contexts that are trained together, and prompts that are continued together, at
    most.
    """
    assert generating.each is not None
    assert asked.generate is not None
    file = generating.each.expanduser()
    found = list(_objects(file))
    simulator = load_at_rate(path, asked.inner_lr, device, dtype)
    lines = [_line(simulator, asked, file, number, value) for number, value in found]
    continuing = Continuing(simulator, generating, asked.generate)
    results: list[dict[str, Any]] = []
    with console.work() as show, torch.inference_mode():
        done: dict[int, dict[str, Any]] = {}
        for together in _by_context(lines, contexts_at_once(simulator, batch)):
            stage = partial(show, done=len(done), total=len(lines))
            for line, answer in _answers(continuing, together, asked, batch, stage):
                done[line.number] = _result(line, answer, asked)
            while len(results) < len(lines) and lines[len(results)].number in done:
                results.append(done[lines[len(results)].number])
                if not as_json:
                    console.print_line(results[-1])
    if as_json:
        console.print_json(
            {
                "inner_lr": float(simulator.inner_lr.detach()),
                "steps": simulator.config.steps,
                "rule": simulator.config.rule,
                **continuing.speed(),
                "lines": results,
            }
        )


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number -> what a line holds, but for empty lines. Raises InputError, with the line's number,
    for one that is no object with a context and a prompt.
    """
    count = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    count += 1
                    with _of_line(file, number):
                        yield number, _object(line)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    if not count:
        raise InputError(f"{file} holds no lines; expected a context and a prompt in each")


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError("it is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is no JSON object: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"it holds a {type(value).__name__}; expected an object")
    for name in _FIELDS:
        if not isinstance(value.get(name), str):
            got = f"a {type(value[name]).__name__}" if name in value else "missing"
            raise InputError(f"its {name} is {got}; expected a text")
    return value


def _line(
    simulator: Simulator, asked: Reading, file: Path, number: int, value: dict[str, Any]
) -> Line:
    with _of_line(file, number):
        context, prompt = (
            Prompt.of_text(value[name], f"its {name}", kind=name) for name in _FIELDS
        )
        ids = asked.ids(context, tokenizing(simulator), simulator.program.facts.longest)
        about = {"id": value["id"]} if "id" in value else {}
        return Line(number, about, tuple(ids), prompt_of(simulator, prompt))


@contextmanager
def _of_line(file: Path, number: int) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}, line {number}: {error}") from error


def _by_context(lines: Sequence[Line], size: int) -> list[list[Line]]:
    """Lines of so many contexts together, side by side where they share one; contexts in the order
    in which they appear.
    """
    found: dict[tuple[int, ...], list[Line]] = {}
    for line in lines:
        found.setdefault(line.context, []).append(line)
    groups = list(found.values())
    return [
        [line for group in groups[first : first + size] for line in group]
        for first in range(0, len(groups), size)
    ]


def _answers(
    continuing: Continuing,
    lines: Sequence[Line],
    asked: Reading,
    batch: int,
    stage: Callable[[str], None],
) -> Iterator[tuple[Line, Continued]]:
    """Of lines whose contexts are trained together."""
    place = {context: n for n, context in enumerate(dict.fromkeys(x.context for x in lines))}
    stage(f"training on {len(place)} contexts")
    adapted = adapt_to(continuing.simulator, list(place), asked.trained)
    for first in range(0, len(lines), batch):
        part = lines[first : first + batch]
        rows = adapted.select([place[line.context] for line in part])
        try:
            found = continuing.rows(rows, [line.prompt for line in part], stage)
        except Diverged as error:
            raise NumericalError(f"line {part[error.row].number}: {error}") from error
        yield from zip(part, found, strict=True)


def _result(line: Line, found: Continued, asked: Reading) -> dict[str, Any]:
    return {
        "line": line.number,
        **line.about,
        "trained_tokens": asked.trained(len(line.context)),
        "prompt_tokens": len(line.prompt),
        "generated": found.text,
        "generated_tokens": found.tokens,
    }
