"""Options that derive from a dataclass of the library: one flag a field, so that a new field is a
flag of every command that takes the dataclass, with its help text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from cyclopts import Parameter, Token

from tintc.ir.described import flag_of, help_of
from tintc.ir.errors import UsageError


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    """Of "5"; cyclopts itself rounds 5.5."""
    return int(tokens[-1].value)


def _whole_or_none(hint: Any, tokens: Sequence[Token]) -> int | None:
    """The same, but "none" is a value too: it takes back what a file says."""
    return None if tokens[-1].value == "none" else _whole(hint, tokens)


def _real_or_none(_: Any, tokens: Sequence[Token]) -> float | None:
    return None if tokens[-1].value == "none" else float(tokens[-1].value)


def at_least(least: int) -> Parameter:
    """Of a whole number that is not smaller."""

    def check(_: Any, value: int | None) -> None:
        if value is not None and value < least:
            raise ValueError(f"expected at least {least}")

    return Parameter(converter=_whole, validator=check)


WHOLE = Parameter(converter=_whole)
ONCE = Parameter(allow_repeating=False)  # of what is read: the last of several does not replace it

T = TypeVar("T", bound="Flags")
Shown = Callable[[dataclasses.Field[Any]], str]


class _NotGiven:
    """The value of a flag that is not on the command line; None may well be given."""

    def __repr__(self) -> str:
        return "not given"


NOT_GIVEN = _NotGiven()


class _NotChecked:
    """Of a flag whose value pydantic leaves alone. cyclopts asks it wherever somebody has imported
    it, and it would refuse NOT_GIVEN.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class Flags:
    """What was given on the command line of the fields of another dataclass; see `flags_of`."""

    _lists: ClassVar[Mapping[str, type | None]] = {}  # by field; of what, if it holds several
    _left_out: ClassVar[Collection[str]] = ()

    def given(self) -> dict[str, Any]:
        """The fields that are on the command line, by name. Raises UsageError for a list that
        holds something else than it should.
        """
        values = {name: getattr(self, name) for name in self._lists}
        return {
            name: value if (kind := self._lists[name]) is None else split(name, value, kind)
            for name, value in values.items()
            if value is not NOT_GIVEN
        }


def flags_of(
    source: type[Any],
    *,
    leave_out: Collection[str] = (),
    help: Mapping[str, str] | None = None,
    shown: Shown | None = None,
    or_none: Collection[str] = (),
) -> Callable[[type[T]], type[T]]:
    """Makes a class a dataclass that cyclopts fills, with a flag for every field of `source` but
    those left out, beside the options of its own.

    help: where a command means something else than the field says. shown: a field's default as
    the help text has it, "" for none. or_none: numbers of which a command takes "none" too.
    """
    hints = get_type_hints(source)

    def decorate(kind: type[T]) -> type[T]:
        lists: dict[str, type | None] = {}
        for each in dataclasses.fields(source):
            if each.name in leave_out:
                continue
            hint, lists[each.name] = _one_value(hints[each.name])
            text = (help or {}).get(each.name) or help_of(each)
            default = (shown or shown_default)(each)
            parameter = _parameter(each, text, default)
            if each.name in or_none:
                hint = hint | None
                parameter = Parameter.combine(parameter, Parameter(converter=_real_or_none))
            elif _without_none(hint) is int:
                optional = hint is not int
                read = Parameter(converter=_whole_or_none) if optional else WHOLE
                parameter = Parameter.combine(parameter, read)
            kind.__annotations__[each.name] = Annotated[hint, parameter, _NotChecked()]
            setattr(kind, each.name, NOT_GIVEN)
        kind._lists = {**kind._lists, **lists}  # behind those of a class that it extends
        kind._left_out = leave_out
        return dataclasses.dataclass(frozen=True, kw_only=True)(kind)

    return decorate


def _parameter(each: dataclasses.Field[Any], help: str, default: str) -> Parameter:
    return Parameter(
        name=flag_of(each),
        help=help,
        metavar=each.metadata.get("metavar"),
        show_default=default or False,
        # None: --no-NAME, which only what is on by default needs
        negative=None if each.default is True else (),
    )


def _one_value(hint: Any) -> tuple[Any, type | None]:
    """What one value on the command line is, and of what a field that holds several is a tuple.
    Several are told by commas or by repeating the flag.
    """
    plain = _without_none(hint)
    if get_origin(plain) is tuple:
        kind = get_args(plain)[0]
        # the dataclass itself reads pairs, as PATTERN=FACTOR
        return list[str], str if get_origin(kind) is tuple else kind
    return hint, None


def _without_none(hint: Any) -> Any:
    """int of int | None; what is no such union, as it is."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    return inner[0] if get_origin(hint) in (Union, UnionType) and len(inner) == 1 else hint


def shown_default(each: dataclasses.Field[Any]) -> str:
    """A field's default, unless that is None, nothing, a switch, or computed."""
    if each.default is dataclasses.MISSING or isinstance(each.default, (bool, type(None))):
        return ""
    if isinstance(each.default, tuple):
        return ",".join(str(part) for part in each.default)
    return f"{each.default:g}" if isinstance(each.default, float) else str(each.default)


def split(name: str, values: Collection[str], kind: type) -> tuple[Any, ...]:
    """All values, each of which may hold several with commas between them."""
    parts = [part.strip() for value in values for part in value.split(",")]
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        expected = {float: "numbers", int: "whole numbers"}[kind]
        raise UsageError(
            f"{name} are {','.join(values)!r}; expected {expected} with commas between them"
        ) from None
