"""Errors for users: each message says what was got, what was expected and what to do.

The command line prints the message as one line and ends with `exit_code`.
"""


class TintcError(ValueError):
    """Anything that tintc refuses or cannot do. Exit code 1."""

    exit_code = 1


class UsageError(TintcError):
    """A call or a configuration that makes no sense: a value out of range, an output that exists.
    Exit code 2.
    """

    exit_code = 2


class InputError(UsageError):
    """Token ids, masks or positions that do not fit the model or each other. Exit code 2."""


class SourceError(TintcError):
    """A model that cannot be found, fetched or read. Exit code 1."""


class UnsupportedModelError(TintcError):
    """A model that tintc cannot simulate; names every offending operator. Exit code 3."""

    exit_code = 3


class MemoryLimitError(TintcError):
    """The work does not fit in this machine's memory. Exit code 4."""

    exit_code = 4


class NumericalError(TintcError):
    """A numerical check failed. Exit code 5."""

    exit_code = 5


class ArtifactError(TintcError):
    """An artifact that is truncated, altered, of another format version, or cannot be written. Exit
    code 1.
    """


class CompilerBug(AssertionError):
    """A pass broke its own contract: never the user's fault. Please report it with the model's
    config.
    """


def raise_if_interrupted(error: BaseException) -> None:
    """Raises KeyboardInterrupt if the error came of one: what unwinds in a library that is
    interrupted may fail in turn, and then says something else.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        seen.add(id(current))
        current = current.__cause__ or current.__context__
