"""Which parameters a config names: by the patterns of `train` and `lr_scale`.

A pattern is one of `fnmatch.fnmatchcase` over a parameter's full names; a tied parameter has
several. Source: TINT.md section 7.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError

_NEAREST = 3  # names that a message gives
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Selection:
    """aliases: further name of a tied parameter -> the name that holds its value. Parameters are
    called by the latter.
    """

    config: SimulatorConfig
    aliases: Mapping[str, str] = field(default_factory=dict)

    def names(self, parameter: str) -> list[str]:
        """All full names of a parameter."""
        return [parameter, *(alias for alias, name in self.aliases.items() if name == parameter)]

    def chosen(self, parameter: str) -> bool:
        """Whether `train` matches it and `lr_scale` leaves it a rate."""
        return self.matched(parameter) and self.factor(parameter) != 0

    def matched(self, parameter: str) -> bool:
        """Whether `train` matches it."""
        return self._matches(parameter, self.config.train)

    def factor(self, parameter: str) -> float:
        """What its learning rate is multiplied by: the last match of `lr_scale` wins; 1 where
        nothing matches.
        """
        factors = [f for pattern, f in self.config.lr_scale if self._matches(parameter, (pattern,))]
        return factors[-1] if factors else 1.0

    def check(self, parameters: Collection[str], buffers: Collection[str] = ()) -> None:
        """Raises UsageError for a pattern that matches none of the model's parameters."""
        scaled = (("lr_scale", pattern) for pattern, _ in self.config.lr_scale)
        for name, pattern in (*(("train", each) for each in self.config.train), *scaled):
            if any(self._matches(each, (pattern,)) for each in parameters):
                continue
            constant = [each for each in buffers if self._matches(each, (pattern,))]
            if constant:
                raise UsageError(
                    f"{name} has the pattern {pattern!r}, which matches buffers only: "
                    f"{shortened(constant)}; expected a pattern of parameters"
                )
            every = (full for each in parameters for full in self.names(each))
            raise UsageError(
                f"{name} has the pattern {pattern!r}, which matches no parameter of this model; "
                f"the nearest are {', '.join(nearest(pattern, every))}"
            )

    def _matches(self, parameter: str, patterns: Iterable[str]) -> bool:
        names = self.names(parameter)
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """The names, as they are and with `*` for numbers of blocks, that are most like a pattern."""
    every = list(names)
    tried = dict.fromkeys((*map(starred, every), *every))
    return difflib.get_close_matches(pattern, tried, _NEAREST, cutoff=0)


def starred(name: str) -> str:
    """`model.layers.0.mlp.weight` -> `model.layers.*.mlp.weight`."""
    return _NUMBER.sub("*", name)


def shortened(names: Iterable[str], most: int = 6) -> str:
    """Names in one line: those that differ in the number of their block alone as one."""
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(starred(name), []).append(name)
    said = [
        group[0] if len(group) == 1 else f"{pattern} (x{len(group)})"
        for pattern, group in counts.items()
    ]
    more = len(said) - most
    return ", ".join(said[:most]) + (f" and {more} more" if more > 0 else "")
