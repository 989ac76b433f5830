"""What reports hold, as types: `report.json` is checked against them when it is read."""

from __future__ import annotations

from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_exactly = with_config(ConfigDict(strict=True, extra="forbid"))


class Phases(TypedDict):
    forward: int
    backward: int
    descent: int


@_exactly
class Part(TypedDict):
    """Some of a simulator's parameters, and where their number comes from."""

    name: str
    count: int
    formula: str


@_exactly
class Modules(TypedDict):
    """Uses of one kind and size of module of the transformer back end."""

    phase: str
    operator: str
    module: str
    formula: str
    sizes: dict[str, int]
    numbers: int
    uses: int
    copies: int
    count: int


@_exactly
class ParameterReport(TypedDict):
    """`tintc.parameter_report`. shares: what the structural constants count under each way of
    sharing.
    """

    backend: str
    share: str
    auxiliary: int
    total: int
    parts: list[Part]
    structure: list[Modules]
    by_phase: Phases
    shares: dict[str, int]
    passes: Phases


@_exactly
class SourceNames(TypedDict):
    """Where the auxiliary model came from."""

    kind: str | None
    name: str | None
    revision: str | None
    sha256: str | None


@_exactly
class TrainedWeights(TypedDict):
    """How many of the auxiliary model's weights learn, their numbers, and those as a share of all
    of its parameters. unreached: selected, but no gradient reaches them.
    """

    weights: int
    parameters: int
    share: float
    unreached: list[str]


@_exactly
class State(TypedDict):
    """What an inner rule keeps of one kind (momentum, first, second, count): slots, and their
    numbers for each sequence.
    """

    slots: int
    numbers: int


@_exactly
class IslandKind(TypedDict):
    """Islands of one program. count: in one forward pass. module, source: of the first. operators:
    of ATen, most frequent first. ordered: it looks at other tokens or at positions.
    """

    count: int
    module: str
    source: str
    operators: list[str]
    weights: int
    ordered: bool


@_exactly
class Islands(TypedDict):
    """What no pass recognised. recognized: share of a call's FLOPs outside of islands."""

    recognized: float
    kinds: list[IslandKind]


@_exactly
class CallEstimate(TypedDict):
    """One call of `batch` sequences."""

    batch: int
    tokens: int
    training_segment: int
    flops: int
    weight_bytes: int
    peak_bytes: int


@_exactly
class Report(TypedDict):
    """`report.json`, and `tintc inspect --json`."""

    source: SourceNames
    config: dict[str, Any]
    inner_lr: float
    backend: str
    share: str
    auxiliary_parameters: int
    parameters: ParameterReport
    blocks: int
    trained_blocks: int
    trained: TrainedWeights
    states: NotRequired[dict[str, State]]  # missing from artifacts that are older
    islands: NotRequired[Islands]
    unlimited: NotRequired[list[str]]  # weights that are 0, which max_drift does not limit
    max_positions: int | None
    max_tokens: int | None
    vocab_size: int
    prefix_slots: int
    trainable_slots: int
    updated_slots: int
    updated_parameters: int
    memory_slots: int
    kept_activations: int
    memory_width: int
    prefix_tokens: int
    sim_hidden: int
    sim_heads: int
    pages: int
    prefix_numbers: int
    operators: dict[str, int]
    depth: int
    dtype: str
    estimate: CallEstimate
