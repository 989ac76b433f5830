"""What all passes share, and who may read and write which part of it.

A pass declares the facts that it reads and writes, as it declares its contracts. While it runs, a
fact that it did not declare cannot be read or written: that is a CompilerBug.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import CompilerBug
from tintc.ir.facts import ModelFacts, least
from tintc.ir.layout import Layout
from tintc.ir.named import Islands

_FIELDS = frozenset(field.name for field in dataclasses.fields(ModelFacts))
FACTS = _FIELDS | {"tables", "layout"}  # what a pass may declare


@dataclass(frozen=True)
class Access:
    """The facts that a pass reads and writes; it may read what it writes."""

    name: str
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if unknown := sorted((self.reads | self.writes) - FACTS):
            raise CompilerBug(f"pass {self.name} declares {', '.join(unknown)}; facts are {FACTS}")


@dataclass
class Context:
    """What all passes share. Facts, tables and layout are written through its methods."""

    config: SimulatorConfig
    # The auxiliary state dict; of parameters only shapes are read.
    tensors: dict[str, Tensor] = field(default_factory=dict)
    # Values of placeholders outside the state dict, which masks and positions are computed from.
    constants: dict[str, Tensor] = field(default_factory=dict)
    facts: ModelFacts = field(default_factory=ModelFacts)
    # Position tables that passes computed, by the names of `inputs.table_name`.
    tables: dict[str, Tensor] = field(default_factory=dict)
    layout: Layout | None = None  # set by the slot passes
    # What one emitted program may count on; of optimizations only.
    choices: Choices = field(default_factory=Choices)
    islands: Islands = "refuse"  # whether what no pass recognises may become islands
    # Further state-dict names of tied parameters -> the name that holds the value.
    aliases: dict[str, str] = field(default_factory=dict)
    vocabulary: int = 0  # how many tokens the model's own config names; 0 for none
    _access: Access | None = field(default=None, repr=False)

    def learn(self, **values: Any) -> None:
        """Writes fields of the facts."""
        for name in values:
            self._may_write(name)
        known = {name: value for name, value in vars(self.facts).items() if name in _FIELDS}
        self.facts = _guarded(ModelFacts(**{**known, **values}), self._access)

    def limit_positions(self, rows: int) -> None:
        """Notes a table of that many positions."""
        self.learn(max_positions=least(self.facts.max_positions, rows))

    def limit_tokens(self, length: int) -> None:
        """Notes that nothing is known of longer sequences."""
        self.learn(max_tokens=least(self.facts.max_tokens, length))

    def add_table(self, name: str, value: Tensor) -> None:
        """Adds a table of positions."""
        self._may_write("tables")
        self.tables[name] = value

    def place(self, layout: Layout) -> None:
        """Sets the layout."""
        self._may_write("layout")
        self.layout = layout

    @contextmanager
    def acting(self, access: Access) -> Iterator[None]:
        """While a pass runs: only what it declared can be read and written."""
        outer, self._access = self._access, access
        self.facts = _guarded(self.facts, access)
        try:
            yield
        finally:
            self._access = outer
            self.facts = _guarded(self.facts, outer)

    def _may_write(self, name: str) -> None:
        if self._access is not None and name not in self._access.writes:
            raise CompilerBug(f"pass {self._access.name} writes {name}, which it does not declare")


class _Guarded(ModelFacts):
    """Facts of which one pass may read some."""

    def __getattribute__(self, name: str) -> Any:
        if name in _FIELDS:
            access: Access = vars(self)["access"]
            if name not in access.reads | access.writes:
                raise CompilerBug(f"pass {access.name} reads {name}, which it does not declare")
        return object.__getattribute__(self, name)


def _guarded(facts: ModelFacts, access: Access | None) -> ModelFacts:
    known = {name: value for name, value in vars(facts).items() if name in _FIELDS}
    if access is None:
        return ModelFacts(**known)
    guarded = _Guarded(**known)
    object.__setattr__(guarded, "access", access)
    return guarded
