"""A lowered program: everything that back ends and inspection need, without weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from tintc.ir.config import SimulatorConfig
from tintc.ir.facts import ModelFacts
from tintc.ir.layout import Layout
from tintc.ir.records import NodeRecord


@dataclass
class Program:
    """graph: the lowered graph. stages: printable records of it and of the earlier stages
    (captured, canonical).
    direct_flops: of fine-tuning the auxiliary model directly, by exact gradients, in a call of
    `cost.call_sizes`; 0 if not known.
    aliases: further state-dict names of tied parameters -> the name that holds the value.
    tables: values of the position tables that the passes computed (rotary, ALiBi, sinusoidal); of a
    loaded program, with its weights."""

    graph: fx.Graph
    config: SimulatorConfig
    facts: ModelFacts
    layout: Layout
    aliases: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    direct_flops: int = 0
    stages: dict[str, list[NodeRecord]] = field(default_factory=dict)
