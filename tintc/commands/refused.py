"""What cyclopts refuses on a command line, as one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)
from cyclopts.annotations import resolve_optional

_KINDS = {int: "a whole number", float: "a number", bool: "nothing, as this is a switch"}


def one_line(error: CycloptsError, app: App) -> str:
    """What was got and what was expected, and where help is."""
    command = " ".join(["tintc", *(error.command_chain or ())])
    if _choices(error):
        return _reason(error, app)
    return f"{_reason(error, app).rstrip('.')}; `{command} --help` shows what there is"


def as_flags(message: str, app: App) -> str:
    """A message of the library, which names arguments as Python has them, as a command line has
    them: force=True is --force, memory=False is --no-memory, data=FILE is --data FILE.
    """

    named = re.compile(r"\b([a-z_]+)=(\w+)")
    if not named.search(message):
        return message  # to list all options takes a third of a second
    known = set(_options(app))

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        option = "--" + name.replace("_", "-")
        if option not in known:
            return found[0]
        return {"True": option, "False": option.replace("--", "--no-", 1)}.get(
            value, f"{option} {value}"
        )

    return named.sub(flag, message)


def _options(app: App) -> Iterator[str]:
    """Every option of every command."""
    for name in app:
        if not name.startswith("-"):
            yield from _options(app[name])
    if app.default_command is not None:
        for argument in app.assemble_argument_collection():
            yield from argument.names


def _reason(error: CycloptsError, app: App) -> str:
    match error:
        case UnknownCommandError() | UnusedCliTokensError():
            return _stray((error.unused_tokens or [""])[0], error, app)
        case UnknownOptionError():
            known = (name for each in error.argument_collection for name in each.names)
            got = error.token.keyword or error.token.value
            return f"No such option: {got}{_meant(got.partition('=')[0], known)}"
        case MissingArgumentError() if error.argument is not None:
            return _missing(error)
        case RepeatArgumentError():
            return f"{error.token.keyword} is given more than once; expected one"
        case CoercionError() | ValidationError() if error.argument is not None:
            return _bad_value(error)
    return str(error)


def _stray(token: str, error: CycloptsError, app: App) -> str:
    if token.startswith("-"):
        return f"No such option: {token}"
    if isinstance(error, UnknownCommandError):
        return f"No such command {token!r}{_meant(token, error.app or app)}"
    return f"unexpected argument {token!r}"


def _missing(error: MissingArgumentError) -> str:
    argument = error.argument
    assert argument is not None
    name = error.keyword or next((t.keyword for t in argument.tokens if t.keyword), None)
    if name is not None:
        return f"Option {name!r} requires an argument"
    if argument.index is not None or not argument.name.startswith("-"):
        return f"Missing argument {argument.name!r}"
    return f"Missing option {' / '.join(map(repr, sorted(argument.names, key=len)))}"


def _bad_value(error: CoercionError | ValidationError) -> str:
    argument = error.argument
    assert argument is not None
    token = argument.tokens[-1] if argument.tokens else None
    if isinstance(error, CoercionError) and error.token is not None:
        token = error.token
    name = (token.keyword if token is not None else None) or argument.name
    got = repr(token.value if token is not None else argument.value)
    if choices := _choices(error):
        plain = name.lstrip("-").replace("-", "_")
        expected = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
        return f"{plain} is {got}; expected {expected}"
    if isinstance(error, ValidationError):
        return f"Invalid value for {name!r}: {got}; {error.exception_message}"
    kind = _KINDS.get(_plain(argument.hint), "a value")
    return f"Invalid value for {name!r}: {got}; expected {kind}"


def _choices(error: CycloptsError) -> tuple[str, ...]:
    if not isinstance(error, CoercionError) or error.argument is None:
        return ()
    hint = _plain(error.argument.hint)
    return get_args(hint) if get_origin(hint) is Literal else ()


def _plain(hint: Any) -> Any:
    """Without None."""
    return resolve_optional(hint)


def _meant(got: str, known: Iterable[str]) -> str:
    """A suggestion, unless nothing comes near or what was got is too short to tell."""
    close = difflib.get_close_matches(got, list(known), n=1, cutoff=0.7) if len(got) > 2 else ()
    return f", did you mean {close[0]}?" if close else ""
