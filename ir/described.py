"""Fields of dataclasses that say what they are for.

The text stands beside the field and nowhere else: the command line makes an option of it, and the
reference a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def about(help: str, *, flag: str | None = None, metavar: str | None = None) -> dict[str, str]:
    """Metadata of a field. flag: of the command line, where it is not the field's name. metavar:
    how a value is written there."""
    given = {"help": help, "flag": flag, "metavar": metavar}
    return {name: value for name, value in given.items() if value is not None}


def help_of(field: dataclasses.Field[Any]) -> str:
    """What a field is for. Raises TypeError for one that does not say."""
    if "help" not in field.metadata:
        raise TypeError(f"the field {field.name} does not say what it is for; see ir/described.py")
    return str(field.metadata["help"])


def flag_of(field: dataclasses.Field[Any]) -> str:
    """`--inner-lr` for inner_lr."""
    return "--" + str(field.metadata.get("flag", field.name)).replace("_", "-")
