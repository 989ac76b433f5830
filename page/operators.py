"""What operators mean, by the dialect's own declarations."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from tintc.ir.dialect import AnyOperator
from tintc.ir.ops import OPERATORS


def operators_file(names: Collection[str]) -> dict[str, dict[str, str]]:
    """data/operators.json: of these operators those that the dialect has, by the name that nodes
    give them.

    An operator that emitted code calls whole goes by its bare name there.
    """
    found = {name: OPERATORS.get(name.removeprefix("tint.")) for name in sorted(names)}
    return {
        name: _described(operator)
        for name, operator in found.items()
        if operator is not None and (name.startswith("tint.") or operator.whole)
    }


def _described(operator: AnyOperator) -> dict[str, str]:
    """formula: what its docstring says, without line breaks inside a paragraph."""
    text = inspect.cleandoc(operator.__doc__ or "")
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return {
        "formula": "\n".join(paragraphs),
        "meaning": operator.meaning,
        "family": operator.family,
    }
