"""A lowered program: everything that back ends and inspection need, without weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from tintc.ir.config import SimulatorConfig
from tintc.ir.facts import ModelFacts
from tintc.ir.layout import Layout
from tintc.ir.records import NodeRecord, from_records, to_records


@dataclass
class Program:
    """The lowered graph, and what it was made from."""

    graph: fx.Graph
    config: SimulatorConfig
    facts: ModelFacts
    layout: Layout
    # Further state-dict names of tied parameters -> the name that holds the value.
    aliases: dict[str, str] = field(default_factory=dict)
    # Position tables that the passes computed (rotary, ALiBi, sinusoidal). A loaded program has
    # them among its weights.
    tables: dict[str, Tensor] = field(default_factory=dict)
    # Records of the graph and of the earlier stages: captured, canonical, lowered.
    stages: dict[str, list[NodeRecord]] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        """Whether training and the last forward pass are programs of their own: steps are a loop,
        or each of both has a length, on which the model's rotation depends.
        """
        return self.config.looped or bool(self.facts.by_length)

    def __getstate__(self) -> dict[str, Any]:
        """The graph as records, as an artifact has it: operators of torch cannot be pickled."""
        return {**self.__dict__, "graph": [record.to_dict() for record in to_records(self.graph)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.graph = from_records(state["graph"])
