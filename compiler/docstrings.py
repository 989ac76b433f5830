"""Lets transformers build models in a Python that has dropped all docstrings (`python -OO`)."""

from __future__ import annotations

import sys
from typing import Any


def allow_none() -> None:
    """While it imports a model, transformers puts its documentation together from docstrings, and
    raises where there are none. In a Python without them nobody reads the result: it is left out.
    """
    if sys.flags.optimize < 2:
        return
    import transformers.utils

    transformers.utils.auto_docstring = _undocumented


def _undocumented(obj: Any = None, **_: Any) -> Any:
    """In place of a decorator that is used with arguments and without."""
    return _as_it_is if obj is None else obj


def _as_it_is(obj: Any) -> Any:
    return obj
