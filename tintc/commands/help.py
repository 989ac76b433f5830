"""How `--help` looks: aligned columns as wide as the terminal, without boxes and colours."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

from cyclopts.help import HelpEntry, HelpPanel
from rich.console import Console, ConsoleOptions
from rich.text import Text

_NAMES = 30  # columns; a longer name has a line of its own
_WIDEST = 100

Command = TypeVar("Command", bound=Callable[..., None])


def says(text: str) -> Callable[[Command], Command]:
    """What `--help` says of a command. A plain docstring would be gone under `python -OO`."""

    def describe(command: Command) -> Command:
        command.__doc__ = inspect.cleandoc(text)
        return command

    return describe


class PlainHelp:
    """A formatter of cyclopts."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """One heading and what stands under it."""
        if not panel.entries:
            return
        rows = [(_names(entry), _says(entry)) for entry in panel.entries]
        column = max((len(names) for names, _ in rows if len(names) <= _NAMES), default=_NAMES)
        console.print(Text(f"{panel.title}:", style="bold"), soft_wrap=True)
        for names, says in rows:
            _print(console, _row(names, says, column, _width(console)))
        _print(console, "")

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        _print(console, _wrap(f"Usage: {_plain(usage).strip()}", _width(console), " " * 7) + "\n")

    def render_description(self, console: Console, options: ConsoleOptions, said: Any) -> None:
        """Paragraphs, filled."""
        for paragraph in _plain(said).strip().split("\n\n"):
            if paragraph:
                text = " ".join(paragraph.split())
                _print(console, _wrap("  " + text, _width(console), "  ") + "\n")


def _row(names: str, says: str, column: int, width: int) -> str:
    """Names, and from one column on what is said of them."""
    indent = " " * (column + 4)
    lines = textwrap.wrap(
        says, max(width - len(indent), 20), break_long_words=False, break_on_hyphens=False
    )
    if len(names) > column:
        return "\n".join([f"  {names}", *(indent + line for line in lines)])
    first, *rest = lines or [""]
    return "\n".join([f"  {names:<{column}}  {first}".rstrip(), *(indent + line for line in rest)])


def _names(entry: HelpEntry) -> str:
    """`-o, --output DIR`."""
    long, short = entry.positive_names, entry.positive_shorts
    value = f" {entry.metavar}" if entry.metavar and not entry.positional_label else ""
    options = ", ".join([*short, *long])
    if entry.negative_names:
        options = "/".join([options, *entry.negative_names])
    return " ".join(part for part in (entry.positional_label, options + value) if part)


def _says(entry: HelpEntry) -> str:
    """The help text, with what may be given, what is taken
    without, and whether there must be one."""
    said = " ".join(_plain(entry.description).split())
    notes = [
        f"[{'|'.join(entry.choices)}]" if entry.choices else "",
        f"[default: {entry.default}]" if entry.default and entry.metavar else "",
        "[required]" if entry.required else "",
    ]
    return " ".join(part for part in (said, *notes) if part)


def _plain(said: Any) -> str:
    found = getattr(said, "primary_renderable", said)
    return found.plain if isinstance(found, Text) else str(found or "")


def _wrap(text: str, width: int, indent: str) -> str:
    return "\n".join(
        textwrap.wrap(
            text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    )


def _width(console: Console) -> int:
    return min(console.width, _WIDEST)


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
